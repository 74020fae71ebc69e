"""``python -m aquant_jax.demo``."""

import re

import pytest

import aquant_jax as aq
from aquant_jax import demo


@pytest.fixture
def recipes(monkeypatch):
    """The recipes that the demo asks for; only rounding to nearest is computed."""
    asked, quantize = [], aq.quantize

    def nearest_only(apply, variables, calibration, recipe, **options):
        asked.append(recipe)
        nearest = aq.recipes.nearest(recipe.weight_bits, recipe.act_bits)
        return quantize(apply, variables, calibration, nearest, **options)

    monkeypatch.setattr(aq, "quantize", nearest_only)
    return asked


def test_every_method_has_a_line(capsys, recipes):
    demo.main(["--presets", "nearest", "aquant", "--steps", "7"])
    scores = dict(re.findall(r"\| (\w+) \| (\d+\.\d\d) \|", capsys.readouterr().out))
    assert scores == {"nearest": "53.60", "aquant": "53.60", "float": "99.60"}
    assert [recipe.preset for recipe in recipes] == ["nearest", "aquant"]
    assert [recipe.reconstruction.steps for recipe in recipes] == [0, 7]
    assert {(recipe.weight_bits, recipe.act_bits) for recipe in recipes} == {(2, 2)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: 0 is less than 1"),
        (["--seed", "-1"], "--seed: -1 is less than 0"),
        (["--bits", "9"], "argument --bits: invalid choice: 9"),
        (["--presets", "gptq"], "argument --presets: invalid choice: 'gptq'"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        demo.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
