"""The Python code of the site's pages runs, and prints what the page shows."""

import ast
import builtins
import doctest
import importlib
import inspect
import itertools
import re
from importlib.util import find_spec

import pytest

from aquant_jax.arithmetic import border
from tests.support.process import REPOSITORY

DOCS = REPOSITORY / "docs"
FENCE = re.compile(r"^( *)```(python|pycon)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
PACKAGES = re.compile(r"^import (haiku|equinox|onnxruntime)", re.MULTILINE)
BORROWED = re.compile(r"# From (examples/\w+\.py)\n(.*)", re.DOTALL)
HOME = DOCS / "index.md"  # tests/test_docs.py checks its ten lines
PAGES = sorted(page for page in DOCS.rglob("*.md") if FENCE.search(page.read_text()))


def without_layout(code):
    """Lines without what differs inside a function."""
    return "\n".join(line.strip() for line in code.splitlines() if line.strip())


@pytest.mark.user_model
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != HOME], ids=lambda page: page.stem
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(border, "BORDERS", dict(border.BORDERS))
    names, skipped = {"__name__": page.stem}, []
    for number, (_, kind, code) in enumerate(FENCE.findall(page.read_text())):
        code = inspect.cleandoc(code) + "\n"
        if borrowed := BORROWED.match(code):  # tests/examples runs it
            assert without_layout(borrowed[2]) in without_layout(
                (REPOSITORY / borrowed[1]).read_text()
            )
            continue
        lacking = [name for name in PACKAGES.findall(code) if find_spec(name) is None]
        if lacking:
            skipped += lacking
            continue
        if kind == "python":
            exec(compile(code, f"{page.name}, block {number}", "exec"), names)
            continue
        test = doctest.DocTestParser().get_doctest(code, names, page.name, page.name, 0)
        runner = doctest.DocTestRunner()
        said = []
        runner.run(test, out=said.append, clear_globs=False)
        assert not runner.failures, "".join(said)
        names = test.globs
    if skipped:
        pytest.skip(f"the rest of the page needs {', '.join(skipped)}")


ENTRIES = [
    entry
    for page in sorted((DOCS / "reference").glob("*.md"))
    for entry in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_example_of_the_reference_imports_what_it_names(entry):
    """As a doctest it sees the names of its module, which a reader does not have."""
    module, _, name = entry.rpartition(".")
    text = inspect.getdoc(getattr(importlib.import_module(module), name)) or ""
    code = "".join(example.source for example in doctest.DocTestParser().get_examples(text))
    nodes = list(ast.walk(ast.parse(code)))
    used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    known = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    known |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    known |= {n.name for n in nodes if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    known |= {n.name for n in nodes if isinstance(n, ast.ExceptHandler)}
    known |= {(n.asname or n.name).split(".")[0] for n in nodes if isinstance(n, ast.alias)}
    assert used - known - set(dir(builtins)) == set()


def test_the_pages_with_code_are_found():
    """A fence that is written otherwise would not run."""
    found = itertools.chain.from_iterable(FENCE.findall(page.read_text()) for page in PAGES)
    written = [page.read_text().count("```py") for page in DOCS.rglob("*.md")]
    assert len(list(found)) == sum(written)
