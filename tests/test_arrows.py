"""Data flows one way: between the packages, and between the modules of one package."""

import ast
import functools
import graphlib

import pytest

from tests.support.process import REPOSITORY

LIBRARY = REPOSITORY / "aquant_jax"
# Each package, or module of the top level, and what it may import.
ARROWS: dict[str, set[str]] = {
    "requirements": set(),
    "errors": set(),
    "terminal": set(),
    "arithmetic": {"errors"},
    "graph": {"errors"},
    "storage": {"arithmetic", "errors"},
    "layers": {"graph", "arithmetic", "errors"},
    "recipe_checks": {"arithmetic", "errors"},
    "recipe_reconstruction": {"recipe_checks", "errors"},
    "recipe": {"recipe_reconstruction", "recipe_checks", "graph", "arithmetic", "errors"},
    "plan": {"layers", "recipe", "graph", "arithmetic", "terminal", "errors"},
    "reconstruction": {
        "plan", "layers", "recipe", "graph", "arithmetic", "storage", "terminal", "errors",
    },
    "deployment": {
        "reconstruction", "plan", "layers", "recipe", "graph", "arithmetic", "storage", "terminal",
        "errors",
    },
    "reporting": {"deployment", "layers", "graph", "arithmetic", "storage", "errors"},
    "quantize": {
        "deployment", "reconstruction", "plan", "layers", "recipe", "graph", "arithmetic", "errors",
    },
    "sensitivity": {"reconstruction", "plan", "layers", "recipe", "graph", "arithmetic", "errors"},
    "allocation": {
        "quantize", "sensitivity", "deployment", "reconstruction", "plan", "layers", "recipe",
        "graph", "arithmetic", "storage", "terminal", "errors",
    },
    "models": {"errors"},
    "data": {"errors"},
    "demo": {"models", "data", "terminal"},
}  # fmt: skip
GPU_OPS_MAY_IMPORT = {"arithmetic", "layers"}
FILES = sorted(path for path in LIBRARY.rglob("*.py") if path != LIBRARY / "__init__.py")


@functools.cache
def _imports(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    froms = [n for n in nodes if isinstance(n, ast.ImportFrom)]
    return names + [f"{n.module}.{alias.name}" for n in froms for alias in n.names]


def _ours(path):
    return [name.split(".")[1:] for name in _imports(path) if name.startswith("aquant_jax.")]


def test_every_package_has_its_arrows():
    found = {path.relative_to(LIBRARY).parts[0].removesuffix(".py") for path in FILES}
    assert found == ARROWS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_arrows_between_packages(path):
    package = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
    assert {parts[0] for parts in _ours(path)} - {package} <= ARROWS[package]
    names = _imports(path)
    assert not {name.split(".")[0] for name in names} & {"launch", "configs", "gpu_ops"}
    # One reads jaxprs, the other defines primitives.
    extends = path.stem in ("trace", "control_flow", "equations", "shards", "onnx_primitives")
    assert extends or not any(name.startswith("jax.extend") for name in names)


@pytest.mark.parametrize("package", sorted(p.name for p in LIBRARY.iterdir() if p.is_dir()))
def test_no_circle_inside_a_package(package):
    if package.startswith("__"):
        pytest.skip("not a package")
    inside = {
        path.stem: {parts[1] for parts in _ours(path) if parts[0] == package and len(parts) > 2}
        for path in (LIBRARY / package).rglob("*.py")
    }
    list(graphlib.TopologicalSorter(inside).static_order())  # raises CycleError


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "gpu_ops").glob("*.py")), ids=lambda p: p.stem
)
def test_gpu_ops_imports_only_what_it_implements(path):
    assert {parts[0] for parts in _ours(path)} <= GPU_OPS_MAY_IMPORT
