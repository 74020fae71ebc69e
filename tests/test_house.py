"""The rules of the house: short modules, short functions, few parameters, whole annotations."""

import ast

import pytest

from tests.support.process import REPOSITORY

FOLDERS = ("aquant_jax", "gpu_ops", "launch", "configs", "docs")
FILES = sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py"))
ANNOTATED = (
    "arithmetic", "graph", "layers", "plan", "reconstruction", "deployment", "storage", "reporting",
)  # fmt: skip
MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 300, 40, 7
# The public entry points: their parameters are keywords.
MANY_PARAMETERS = {("aquant_jax/quantize.py", name) for name in ("quantize", "quantize_seeds")}
MANY_PARAMETERS |= {("aquant_jax/allocation/allocate.py", "allocate")}


def name_of(path):
    return str(path.relative_to(REPOSITORY))


def functions(path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, kinds)]


def parameters(function):
    found = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [a for a in found if a.arg not in ("self", "cls")]


def code_lines(function):
    """Lines of a function without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        lines -= first.end_lineno - first.lineno + 1
    return lines


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_modules_and_functions_are_short(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES
    long = {f.name: code_lines(f) for f in functions(path)}
    assert {name: n for name, n in long.items() if n > MOST_FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_have_few_parameters(path):
    many = {
        f.name: len(parameters(f))
        for f in functions(path)
        if len(parameters(f)) > MOST_PARAMETERS and (name_of(path), f.name) not in MANY_PARAMETERS
    }
    assert many == {}


@pytest.mark.parametrize("package", ANNOTATED)
def test_the_core_is_annotated(package):
    missing = []
    for path in sorted((REPOSITORY / "aquant_jax" / package).rglob("*.py")):
        for function in functions(path):
            bare = [a.arg for a in parameters(function) if a.annotation is None]
            if bare or function.returns is None:
                missing.append(f"{path.name}:{function.lineno} {function.name} {bare}")
    assert missing == []
