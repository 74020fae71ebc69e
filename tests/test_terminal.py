"""What is printed: tables on a terminal, and elsewhere the text that was always printed."""

import sys

import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax.deployment.sizes import Sizes
from aquant_jax.reconstruction.observer import TerminalObserver
from aquant_jax.terminal import show, show_markdown
from tests.support.nets import residual_net

SIZES = Sizes(4000, 300, 20, 100, 60, 20)
MARKDOWN = "| preset | top-1 % |\n| --- | --- |\n| aquant | **97.60** |"


def be_a_terminal(monkeypatch):
    """In the test itself: pytest gives fixtures another standard output."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "dumb")


@pytest.fixture(scope="module")
def net():
    apply, variables = residual_net()
    x = np.ones((16, 8, 8, 3), np.float32)
    return aq.prepare(apply, variables, x, aq.recipes.nearest(weight_bits=4, act_bits=4))


def test_text_where_there_is_no_terminal(net, capsys):
    show(aq.describe(net))
    assert capsys.readouterr().out == f"{aq.describe(net)}\n"
    show(SIZES)
    assert capsys.readouterr().out == f"{SIZES}\n"
    show_markdown(MARKDOWN)
    assert capsys.readouterr().out == f"{MARKDOWN}\n"


def test_tables_on_a_terminal(net, monkeypatch, capsys):
    be_a_terminal(monkeypatch)
    observer = TerminalObserver()
    observer.on_start(net)
    observer.on_end()
    out = capsys.readouterr().out
    assert "block_1/conv2/kernel" in out
    assert "│" in out
    assert str(aq.describe(net)).splitlines()[-1] in out
    show(SIZES)
    out = capsys.readouterr().out
    assert "8.0 times smaller" in out
    assert any("borders" in line and "100" in line and "20.0%" in line for line in out.splitlines())
    show_markdown(MARKDOWN)
    out = capsys.readouterr().out
    assert "97.60" in out
    assert "|" not in out


def test_brackets_in_a_path_are_no_markup(monkeypatch, capsys):
    be_a_terminal(monkeypatch)

    def apply(variables, x):
        return x @ variables["[red]layers[/red]"][0]

    weight = residual_net()[1]["head"]["kernel"]
    variables = {"[red]layers[/red]": [weight]}
    recipe = aq.recipes.nearest(weight_bits=4, act_bits=4)
    show(aq.describe(aq.prepare(apply, variables, weight.T, recipe)))
    assert "[red]layers[/red]/0" in capsys.readouterr().out
