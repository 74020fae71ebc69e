"""An old Python or JAX is told in one line when the package is imported."""

import re
import sys
import tomllib
from importlib import metadata

import pytest

from aquant_jax import requirements
from tests.support.process import REPOSITORY, run_python


def test_an_old_python_is_one_line_at_the_first_import():
    done = run_python("import sys; sys.version_info = (3, 10, 13); import aquant_jax")
    assert done.returncode == 1
    message = "ImportError: aquant_jax needs Python 3.11 or newer; this is Python 3.10.13"
    assert done.stderr.splitlines()[-1] == message


@pytest.mark.parametrize("version", ["0.7.2", "0.9.10"])
def test_an_old_jax(monkeypatch, version):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(ImportError, match=f"needs JAX 0.10 or newer; JAX {version} is installed"):
        requirements.check()


def test_no_jax(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ImportError, match=r"needs JAX 0.10 or newer; it is not installed: pip"):
        requirements.check()


@pytest.mark.parametrize("version", ["0.10.2", "0.11.0.dev20260101", "1.0"])
def test_a_newer_jax_passes(monkeypatch, version):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    requirements.check()


def test_pip_is_told_the_same():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (jax,) = [text for text in project["dependencies"] if re.match(r"jax\b", text)]
    oldest = [".".join(map(str, v)) for v in (requirements.OLDEST_JAX, requirements.OLDEST_PYTHON)]
    assert [jax.partition(",")[0], project["requires-python"]] == [
        f"jax>={oldest[0]}",
        f">={oldest[1]}",
    ]
    assert sys.version_info >= requirements.OLDEST_PYTHON
