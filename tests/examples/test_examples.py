"""Every example runs, trained little and rounded to nearest: it prints what it says."""

import contextlib
import importlib.util
import json
import re
import runpy
import sys

import pytest
from absl import app
from absl.testing import flagsaver

from tests.support.process import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
# Flags that make it short; packages that it needs; what it prints.
SHORT = {
    "character_stack": (
        ["--train_steps=2", "--steps=0", "--samples=32", "--layers=1"],
        ["flax"],
        r"bits a character",
    ),
    "dict_of_inputs": ([], [], r"score: relative error 0\.0[0-4]"),
    "equinox_model": (
        ["--epochs=100", "--steps=0", "--preset=nearest"],
        ["equinox"],
        r"float [6-9]\d\.\d\d%, w4a4",
    ),
    "haiku_model": (
        ["--epochs=20", "--steps=0", "--preset=nearest"],
        ["haiku"],
        r"float [5-9]\d\.\d\d%, w4a4 [3-9]\d\.\d\d%",
    ),
    "hugging_face_flax": (
        ["--steps=0", "--preset=nearest"],
        ["transformers.models.bert.modeling_flax_bert"],
        r"logits: relative error 0\.0[0-4]",
    ),
    "keras_model": (
        ["--epochs=1", "--steps=0", "--preset=nearest"],
        ["keras"],
        r"float \d+\.\d\d%, w4a4 \d+\.\d\d%",
    ),
    "linen_model": (
        ["--epochs=2", "--steps=0", "--preset=nearest"],
        ["flax"],
        r"float \d+\.\d\d%, w4a4 \d+\.\d\d%",
    ),
    "nnx_model": (
        ["--steps=0", "--preset=nearest"],
        ["flax"],
        r"float 9\d\.\d\d%, w4a4 [5-9]\d\.\d\d%",
    ),
    "plain_jax": (["--steps=0", "--preset=nearest"], [], r"float 9\d\.\d\d%, w3a3 [5-9]\d\.\d\d%"),
    "rnn_digits": (["--epochs=1", "--steps=0"], ["flax"], r"float \d.*, nearest \d.*, aquant \d"),
}

# Their frameworks and loops have tests of their own, or a notebook.
SLOW = (
    "character_stack", "equinox_model", "haiku_model", "keras_model", "linen_model", "rnn_digits",
)  # fmt: skip


def _is_installed(package):
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a parent
        return False


@pytest.mark.user_model
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])
        for path in sorted(EXAMPLES.glob("*.py"))
    ],
)
def test_an_example_runs(name, tmp_path, monkeypatch, capsys):
    """In this process: the imports of one of its own would take longer than the example."""
    given, packages, expected = SHORT[name]
    for package in packages:
        if not _is_installed(package):
            pytest.skip(f"needs {package}")
    out = [f"--out={tmp_path / 'scores.json'}"] if name in ("character_stack", "rnn_digits") else []
    file = str(EXAMPLES / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [file, *given, *out])
    app.define_help_flags()
    with flagsaver.flagsaver(), contextlib.suppress(SystemExit):  # forgets the example's flags
        runpy.run_path(file, run_name="__main__")
    assert re.search(expected, capsys.readouterr().out)
    if out:
        scores = json.loads((tmp_path / "scores.json").read_text())
        assert scores["seed"] == 0
