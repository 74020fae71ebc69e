"""The import arrows of docs/design.md point one way."""

import ast

import pytest
from conftest import REPOSITORY

NUMERIC = {"numerics", "border", "rounding", "observers", "layer"}
LATER = {"reconstruct", "pipeline", "checkpoint"}
# module or folder -> library modules that it must not import
FORBIDDEN = {
    "numerics": {"border", "rounding", "observers", "layer", "graph", "fold"} | LATER,
    "border": {"rounding", "observers", "layer", "graph", "fold"} | LATER,
    "rounding": {"border", "observers", "layer", "graph", "fold"} | LATER,
    "observers": {"border", "rounding", "layer", "graph", "fold"} | LATER,
    "layer": LATER,
    "graph": NUMERIC | LATER | {"fold"},
    "fold": NUMERIC | LATER,
    "reconstruct": {"pipeline", "checkpoint"},
    "models": NUMERIC | LATER | {"graph", "fold", "recipe", "evaluate", "data", "plots"},
    "data": NUMERIC | LATER | {"graph", "fold", "recipe", "evaluate", "models", "plots"},
}


def imports(path):
    """Dotted names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = sorted((REPOSITORY / "aquant_jax").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_arrows(path):
    unit = path.relative_to(REPOSITORY / "aquant_jax").parts[0].removesuffix(".py")
    names = list(imports(path))
    ours = {name.split(".")[1] for name in names if name.startswith("aquant_jax.")}
    assert not ours & FORBIDDEN.get(unit, set())
    assert not {name.split(".")[0] for name in names} & {"launch", "configs", "gpu_ops"}
    assert unit == "graph" or not any(name.startswith("jax.extend") for name in names)
