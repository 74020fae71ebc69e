"""The documents: tables are those of the measurements, links lead somewhere, code and builds do."""

import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

import aquant_jax as aq
from aquant_jax import models
from launch.lib.release_checks import first_example
from tests.support.process import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])


@pytest.fixture(scope="module")
def results():
    path = REPOSITORY / "docs" / "results_tables.py"
    spec = importlib.util.spec_from_file_location("results_tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_generated_from_the_measurements(results):
    assert results.main(["--check"]) == 0


def test_a_figure_typed_by_hand_is_found(results):
    page = (REPOSITORY / "docs" / "results.md").read_text()
    tables = results.tables()
    assert results.outdated(page, tables) == []
    name = re.search(r"<!-- generated: (\S+) -->", page)[1]
    digit = re.search(r"\d\d\.\d\d", tables[name])[0]
    assert results.outdated(page.replace(digit, "99.99"), tables) != []


def test_every_network_has_a_line_in_the_table_of_networks(results):
    networks = sys.modules["models_table"].NETWORKS
    assert models.MODELS.keys() <= networks.keys()
    configs = {path.stem for path in (REPOSITORY / "configs").glob("*.py")}
    assert {config for _, _, config in networks.values()} <= configs
    table = results.tables()["models"]
    for label, data, _ in networks.values():
        _, _, section = table.partition(f"### {data}\n")
        assert f"\n| {label} |" in section.partition("###")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    named = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    named += re.findall(r"`((?:aquant_jax|launch|gpu_ops|tests|docs|configs)/[\w/.]+\.\w+)`", text)
    for name in named:
        places = (page.parent / name, REPOSITORY / name)
        assert any(place.exists() for place in places), f"{page.name} names {name}"


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_ten_lines_fit_the_library(page, monkeypatch):
    """Their names, arguments and data; other tests quantize, save and restore."""
    code = first_example(REPOSITORY / page)
    for name, result in (("quantize", "network"), ("save", None), ("restore", len)):
        bind = inspect.signature(getattr(aq, name)).bind
        check = lambda *own, bind=bind, result=result, **more: bind(*own, **more) and result  # noqa: E731
        monkeypatch.setattr(aq, name, check)
    found = {}
    exec(code, found)
    assert found["quantized"] == "network"
    assert found["logits"] == 500


def test_what_an_installation_builds():
    build = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["scikit-build"]
    assert build["wheel"]["packages"] == ["aquant_jax", "gpu_ops"]
    option = {"env": "GPU_OPS_CUDA", "default": "AUTO"}
    assert build["cmake"]["define"]["GPU_OPS_CUDA"] == option


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_a_change_of_requirements_or_of_cpp_updates_the_environment(tmp_path):
    for stamp in (".created", ".test"):
        (tmp_path / stamp).touch()

    def commands(*changed):
        assumed = [option for name in changed for option in ("-W", name)]
        command = ["make", "-n", f"VENV={tmp_path}", *assumed, f"{tmp_path}/.test"]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout

    assert "install" not in commands()
    for name in ("pyproject.toml", "gpu_ops/bindings.cc", "gpu_ops/include/geometry.h"):
        for what in ("--no-deps --editable .", "--only-deps '.[test]'"):
            assert what in commands(name)
