"""House rules that a program can check: sizes, direction of imports, forbidden constructs."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["kernels", "models", "router", "engine", "bench"]  # each may import those before it
CLIS = {"engine/chat", "engine/calibrate", "bench"}  # folders whose files may print
MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 400, 50, 90
MAX_PRODUCT = 27_400  # lines of all packages: what grows somewhere shrinks elsewhere
MAX_README = 200
# What a room of kernels/ may import beside itself, weight.py and checks.py: an operation stands
# beside its Triton kernel, and so needs the machinery of the GPU; a CPU kernel never does.
ROOMS = {
    "layer": {"gpu"},
    "round": {"gpu"},
    "route": {"gpu"},
    "gpu": set(),
    "cpu": {"layer", "round", "route"},
}
READMES = sorted(p for p in ROOT.rglob("*.md") if ".venv" not in p.parts)
SOURCES = sorted(p for d in [*PACKAGES, "tests"] for p in (ROOT / d).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = [ast.unparse(d) for d in function.decorator_list]
    return any(name.startswith("triton.jit") or name == "kernel" for name in names)


def imported_packages(tree: ast.AST) -> Iterator[str]:
    """Top-level names of every import, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield (node.module or "").split(".")[0]


@pytest.fixture(params=SOURCES, ids=relative)
def source(request):
    return request.param


def test_sizes(source):
    text = source.read_text()
    assert len(text.splitlines()) <= MAX_FILE, relative(source)
    for function in functions(ast.parse(text)):
        lines = function.end_lineno - function.lineno + 1
        limit = MAX_KERNEL if is_kernel(function) else MAX_FUNCTION
        assert lines <= limit, f"{relative(source)}:{function.name} has {lines} lines"


def test_imports_point_one_way(source):
    package = source.relative_to(ROOT).parts[0]
    if package == "tests":
        return
    allowed = PACKAGES[: PACKAGES.index(package) + 1]
    for name in imported_packages(ast.parse(source.read_text())):
        assert name not in PACKAGES or name in allowed, f"{relative(source)} imports {name}"
        assert name not in ("tests", "transformers") or package == "bench", relative(source)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_kernels_keep_apart(room):
    for path in sorted((ROOT / "kernels" / room).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module is None or not module.startswith("kernels"):
                continue
            names = [f"{module}.{alias.name}" for alias in node.names] + [module]
            rooms = {name.split(".")[1] for name in names if "." in name} & ROOMS.keys()
            assert rooms <= {room} | ROOMS[room], f"{relative(path)} imports {module}"


def test_cpu_operations_load_nothing_of_the_gpu():
    imported = {
        node.module
        for node in ast.walk(ast.parse((ROOT / "kernels" / "ops_cpu.py").read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    assert not any(module.startswith("kernels.gpu") for module in imported), imported


def test_product_does_not_grow():
    lines = sum(len(path.read_text().splitlines()) for path in SOURCES if path.parts[-2] != "tests")
    assert lines <= MAX_PRODUCT, lines


def test_packages_are_all_listed():
    """setuptools takes the packages that pyproject.toml names, and no other."""
    named = set(re.findall(r'"([\w.]+)"', (ROOT / "pyproject.toml").read_text()))
    for path in SOURCES:
        if path.name == "__init__.py":
            assert relative(path.parent).replace("/", ".") in named, relative(path.parent)


def test_forbidden_constructs(source):
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            assert caught not in ("", "Exception", "BaseException"), f"{source}:{node.lineno}"
        if source.parts[-2] != "tests" and isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            is_cli = relative(source.parent) in CLIS
            assert called != "print" or is_cli, f"{source}:{node.lineno} prints"
            assert called not in ("eval", "exec"), f"{source}:{node.lineno}"


def test_every_file_says_what_it_is(source):
    assert ast.get_docstring(ast.parse(source.read_text())), f"{relative(source)} has no docstring"


def test_tests_are_flat_and_do_not_shadow_packages():
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert all(path.parent == ROOT / "tests" for path in (ROOT / "tests").rglob("*.py"))
    for package in PACKAGES:
        assert Path(importlib.import_module(package).__file__).parent == ROOT / package


@pytest.mark.parametrize("readme", READMES, ids=relative)
def test_readme_links_and_commands_exist(readme):
    text = readme.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (readme.parent / target).exists(), f"{relative(readme)} links to {target}"
    if readme.name == "LOG.md":
        return  # of its day
    for module in re.findall(r"python -m ((?:engine|bench)\.\w+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_readme_is_read_in_one_go():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README
