"""A checkout that is not compiled says so in one line, wherever it is imported."""

import runpy
import sys
from pathlib import Path

import pytest

import gpu_ops
import launch
from gpu_ops import targets


@pytest.fixture
def error(monkeypatch):
    """What the import of a `gpu_ops` without its compiled module raises."""
    monkeypatch.setitem(sys.modules, "gpu_ops._cpu", None)
    monkeypatch.delattr(gpu_ops, "_cpu")
    with pytest.raises(ImportError) as caught:
        runpy.run_path(targets.__file__)
    return caught.value


def test_the_error_names_the_folder_and_the_command(error):
    folder = Path(targets.__file__).parent
    assert str(error) == (
        f"gpu_ops in {folder} is not compiled for this Python: pip install -e {folder.parent}"
    )
    assert error.__suppress_context__


def test_programs_print_it_without_traceback(error, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        launch.show_error(type(error), error, None)
    assert capsys.readouterr().err == f"error: {error}\n"
    shown = []
    monkeypatch.setattr(launch, "_show", lambda *of: shown.append(of))
    other = ImportError("no such module", name="other")
    launch.show_error(type(other), other, None)
    assert shown == [(type(other), other, None)]
