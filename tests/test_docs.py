"""The documents: their tables are those of the measurements, and their links lead somewhere."""

import importlib.util
import re

import pytest

from tests.support.process import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    named = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    named += re.findall(r"`((?:aquant_jax|launch|gpu_ops|tests|docs|configs)/[\w/.]+\.\w+)`", text)
    for name in named:
        places = (page.parent / name, REPOSITORY / name)
        assert any(place.exists() for place in places), f"{page.name} names {name}"
