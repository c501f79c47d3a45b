"""The measurements: every script says what it does, and the load counts what it should."""
import subprocess
import sys

import pytest

from helpers import TOP

FOLDER = TOP / "benchmarks"
SCRIPTS = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.py")
                 if "__main__" in path.read_text() or path.parent.name == "peers")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_it_does_and_does_nothing_else(script):
    done = subprocess.run([sys.executable, FOLDER / script, "--help"], text=True, timeout=30,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 40 and not done.stdout.split()[0].isdigit(), done.stdout


@pytest.mark.parametrize("script, package", [
    ("peers/aiohttp_sse_server.py", "aiohttp"), ("peers/sse_starlette_uvicorn.py", "uvicorn")])
def test_a_peer_names_the_package_that_it_misses(script, package):
    done = subprocess.run([sys.executable, "-S", FOLDER / script], text=True, timeout=30,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)     # -S: no packages
    assert done.returncode == 1
    assert f"needs the package {package}" in done.stderr
