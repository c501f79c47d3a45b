"""What installing gives: the command, the page and the modules, from a wheel and from an sdist."""
import ast
import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import venv
import zipfile
from contextlib import contextmanager
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest

from helpers import PATIENCE, TOP, Client, need

BUILDER = "setuptools>=70.1"        # the first that needs no package `wheel`
SDIST = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"


def run(*command: object, **options) -> str:
    """Run a command that must succeed, and return its output."""
    done = subprocess.run([str(part) for part in command], text=True, timeout=120,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def pip(*arguments: object, **options) -> str:
    """Run pip, which must succeed."""
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, **options)


def names_of_modules() -> List[str]:
    """Return the files that setup.cfg says are installed."""
    config = configparser.ConfigParser()
    config.read(TOP / "setup.cfg", encoding="utf-8")
    packages = {path.parent for path in TOP.glob("sse_core/**/*.py")}
    named = {TOP / name.replace(".", "/") for name in config["options"]["packages"].split()}
    assert named == packages
    inner = sorted(str(path.relative_to(TOP)) for path in TOP.glob("sse_core/**/*.py"))
    at_the_top = [f"{name}.py" for name in config["options"]["py_modules"].split()]
    return [*at_the_top, *inner, "sse_core/py.typed"]


def copy_of_checkout(folder: Path) -> Path:
    """Copy the tracked files, so that a build leaves nothing in the checkout."""
    if not (TOP / ".git").exists():
        pytest.skip("this is no checkout")
    tracked = run(need("git", "git"), "ls-files", "-z", cwd=TOP)
    for name in filter(None, tracked.split("\0")):
        if (TOP / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TOP / name, folder / name)
    return folder


def get_builder(folder: Path) -> None:
    """Install setuptools in a folder: skip where no registry can be reached, but fail in CI."""
    try:
        pip("install", "--quiet", "--target", folder, BUILDER)
    except AssertionError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"pip cannot install {BUILDER}: {str(error)[-300:]}")


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Tuple[Path, Path]:
    """Build a wheel and an sdist, and return their paths."""
    folder, tools = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("tools")
    checkout = copy_of_checkout(tmp_path_factory.mktemp("checkout"))
    get_builder(tools)
    env = {**os.environ, "PYTHONPATH": str(tools)}
    run(sys.executable, "-c", SDIST, folder, cwd=checkout, env=env)
    pip("wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, cwd=checkout,
        env=env)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def command(packages, tmp_path_factory) -> Path:
    """Install the wheel in a fresh environment, and return its command."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    run(folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install",
        "--no-deps", "--no-index", packages[0])
    return folder / "bin" / "sse-server"


@contextmanager
def running(command: Path, folder: Path, **more: str) -> Iterator[Tuple[subprocess.Popen, int]]:
    """Run the installed command in a folder, away from the checkout."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env.update(more)
    with subprocess.Popen([str(command), "--port", "0", "--interval", "0.05"], cwd=folder, env=env,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        try:
            yield process, port_of(process)
        finally:
            if process.poll() is None:
                process.kill()


def port_of(process: subprocess.Popen) -> int:
    """Read where the server says it listens."""
    for line in process.stdout:
        port = line.strip().rpartition(b":")[2]
        if port.isdigit():
            return int(port)
    raise AssertionError(process.stderr.read().decode())


def page(port: int) -> bytes:
    """Get what a browser is shown."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"Accept": "text/html"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=PATIENCE) as answer:
        return answer.read()


def metadata(wheel: Path) -> Message:
    """Return the metadata of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_every_module_is_named():
    at_the_top = {name for name in names_of_modules() if "/" not in name}
    there = {path.name for path in TOP.glob("*.py")}
    assert at_the_top == there == {"publisher.py", "sse_server.py"}


def test_every_module_can_be_read_by_python_3_9():
    for name in names_of_modules():
        ast.parse((TOP / name).read_text(encoding="utf-8"), feature_version=(3, 9))


def imported(name: str) -> set:
    """Return the whole names of the modules that a file imports when it runs.

    What only a type checker sees is left out.
    """
    tree = ast.parse((TOP / name).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    plain = {each.name for node in ast.walk(tree) if isinstance(node, ast.Import)
             for each in node.names}
    partly = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    parts = {f"{node.module}.{each.name}" for node in partly for each in node.names}
    return plain | {node.module for node in partly} | parts


def test_imports_point_one_way():
    for name in names_of_modules():
        if name.startswith("sse_core/") and name.endswith(".py"):
            assert not imported(name) & {"sse_server", "publisher"}, name
    assert "sse_server" not in imported("publisher.py")


def test_the_wheel_is_for_any_machine_and_holds_the_modules_and_the_page(packages):
    wheel = packages[0]
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    modules = {name for name in names if ".dist-info/" not in name and ".data/" not in name}
    assert modules == set(names_of_modules())
    assert [name for name in names if name.endswith(".data/data/share/sse-server/index.html")]
    assert [name for name in names if ".dist-info/" in name and name.endswith("/LICENSE")]


def test_the_metadata_asks_for_python_3_9_and_for_no_package_by_default(packages):
    fields = metadata(packages[0])
    assert fields["Name"] in ("sse-server", "sse_server")
    assert fields["Requires-Python"] == ">=3.9"
    assert "redis" in fields.get_all("Provides-Extra")
    needed = [line.replace('"', "'") for line in fields.get_all("Requires-Dist")]
    assert all("extra ==" in line for line in needed)       # by default the standard library alone
    assert any(line.startswith("redis") and "extra == 'redis'" in line for line in needed)


def test_the_sdist_holds_what_a_build_needs(packages):
    with tarfile.open(packages[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "index.html", "setup.cfg", "pyproject.toml"} <= names
    assert set(names_of_modules()) <= names


def test_the_installed_command_serves_the_page_and_the_clock(command, tmp_path):
    with running(command, tmp_path) as (process, port), Client(port) as client:
        assert page(port) == (TOP / "index.html").read_bytes()
        assert len(client.read_events(2)) >= 2
        process.terminate()
        errors = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 0
        assert b"Traceback" not in errors
        client.read_to_end()


def test_installed_into_a_folder_of_its_own_it_finds_its_page(packages, tmp_path):
    folder = tmp_path / "target"
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet",
        "--no-deps", "--no-index", "--target", folder, packages[0])
    with running(folder / "bin" / "sse-server", tmp_path, PYTHONPATH=str(folder)) as (_, port):
        assert page(port) == (TOP / "index.html").read_bytes()
