"""The house of docs/architecture.md: imports point one way, and pure modules stay pure."""
import ast
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from helpers import TOP

# A package may import those behind it, and itself.
LAYERS = {
    "sse_core.errors": (),
    "sse_core.engine": ("sse_core.errors",),
    "sse_core.http": ("sse_core.errors", "sse_core.engine"),
    "sse_core.stores": ("sse_core.errors", "sse_core.engine"),
    "sse_core.cli": ("sse_core.errors", "sse_core.engine"),
    "publisher": ("sse_core.errors", "sse_core.engine"),
}
PURE = ("engine/frames", "engine/log", "engine/pace", "http/http1", "http/body",
        "http/parameters", "http/access", "http/signed")
IMPURE = {"socket", "threading", "time", "select", "selectors", "ssl", "queue", "os"}


def modules() -> list:
    """Return the product's modules, as paths, but the one that puts all together."""
    return [TOP / "publisher.py", *sorted((TOP / "sse_core").rglob("*.py"))]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(TOP).with_suffix("").parts)


@lru_cache(maxsize=None)
def imports_of(path: Path) -> set:
    """Return the full names of all that a module imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer_of(name: str) -> str:
    return next((layer for layer in LAYERS if f"{name}.".startswith(f"{layer}.")), "")


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_point_down_the_house_and_never_up(path):
    layer = layer_of(name_of(path))
    for name in imports_of(path):
        assert not name.startswith("sse_server"), f"{name} is at the top"
        imported = layer_of(name)
        if imported and layer:
            assert imported in (layer, *LAYERS[layer]), f"{name} is not below {layer}"


def test_no_test_module_imports_another():
    """What two of them share has a file of its own in tests/."""
    for path in (TOP / "tests").rglob("test_*.py"):
        from_tests = [name for name in imports_of(path) if name.startswith("test_")]
        assert not from_tests, f"{path.name} imports {from_tests}"


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_imports_no_socket_thread_or_clock(name):
    imported = {each.partition(".")[0] for each in imports_of(TOP / "sse_core" / f"{name}.py")}
    assert not imported & IMPURE


def test_no_two_modules_import_each_other():
    """Circles are not hidden inside functions, either."""
    names = {name_of(path): path for path in modules()}
    graph = {name: {each for each in names for found in imports_of(path)
                    if each != name and f"{found}.".startswith(f"{each}.")}
             for name, path in names.items()}

    def reaches(start: str) -> set:
        seen, todo = set(), [start]
        while todo:
            for each in graph[todo.pop()] - seen:
                seen.add(each)
                todo.append(each)
        return seen
    assert [name for name in graph if name in reaches(name)] == []


def test_the_default_path_loads_no_optional_or_heavy_module():
    code = "import sys; import sse_server; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=TOP, check=True, text=True,
                            capture_output=True).stdout.split()
    heavy = {"sqlite3", "redis", "jwt", "cryptography", "asyncio", "http.server", "multiprocessing"}
    assert not heavy & set(loaded)
