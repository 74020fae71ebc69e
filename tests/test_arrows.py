"""Data flows one way: a module of the library imports only modules that stand before it."""

import ast

import pytest
from conftest import REPOSITORY

ORDER = (
    " errors packing numerics border rounding observers graph trace program fold sites blocks"
    " window columns layer integer cache recipe checks plan network unit grids compiler"
    " reconstruct report environment workdir store resume quantized exported checkpoint"
    " onnx_export pipeline sensitivity runtime evaluate plots "
)
APART = {"models", "data"}  # these import nothing of the library but its errors
FILES = sorted((REPOSITORY / "aquant_jax").rglob("*.py"))


def _imports(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    froms = [n for n in nodes if isinstance(n, ast.ImportFrom)]
    return names + [f"{n.module}.{alias.name}" for n in froms for alias in n.names]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_arrows(path):
    unit = path.relative_to(REPOSITORY / "aquant_jax").parts[0].removesuffix(".py")
    names = _imports(path)
    ours = {name.split(".")[1] for name in names if name.startswith("aquant_jax.")} - {unit}
    before = ["errors"] if unit in APART else ORDER.split(f" {unit} ")[0].split()
    assert unit == "__init__" or ours <= set(before)
    assert not {name.split(".")[0] for name in names} & {"launch", "configs", "gpu_ops"}
    assert unit == "trace" or not any(name.startswith("jax.extend") for name in names)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "gpu_ops").glob("*.py")), ids=lambda p: p.stem
)
def test_gpu_ops_imports_only_what_it_implements(path):
    ours = {name for name in _imports(path) if name.startswith("aquant_jax.")}
    modules = {name.split(".")[1] for name in ours}
    assert modules <= {"border", "columns", "integer", "numerics", "window"}
