import dataclasses
import json

import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax import recipes
from aquant_jax.arithmetic import border as borders
from aquant_jax.errors import InputError
from aquant_jax.recipe import PRESETS, Override, Recipe, Reconstruction, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_named_frozen_and_hashable(name):
    recipe = getattr(recipes, name)(weight_bits=2, act_bits=3, steps=7)
    assert (recipe.preset, recipe.weight_bits, recipe.act_bits) == (name, 2, 3)
    assert recipe.reconstruction.steps == 7
    assert hash(recipe) == hash(preset(name, weight_bits=2, act_bits=3, steps=7))
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.weight_bits = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.reconstruction.steps = 1


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_survives_json(name):
    recipe = preset(name, overrides=(Override("a.*", 3),), blocks=("b_[0-9]",))
    fields = json.loads(json.dumps(recipe.to_dict()))
    assert preset(fields.pop("preset"), **fields) == recipe


def test_presets_mean_what_the_papers_rows_mean():
    nearest, adaround, brecq, qdrop, aquant, plus, aquant_bert = (preset(n) for n in PRESETS)
    fields = {"preset": "aquant", "finetune_steps": 0}
    assert plus.replace(**fields) == aquant
    assert plus.replace(steps=7).reconstruction.whole_network_steps == 7
    assert nearest.reconstruction.steps == 0
    assert adaround.granularity == aquant_bert.granularity == "layer"
    assert {r.granularity for r in (brecq, qdrop, aquant)} == {"block"}
    for recipe in (nearest, adaround, brecq, aquant_bert):
        learning = recipe.reconstruction
        assert (learning.input_mixing, learning.quant_drop_prob) == (0, 0)
    for recipe in (qdrop, aquant):
        learning = recipe.reconstruction
        assert (learning.input_mixing, learning.quant_drop_prob) == (0.5, 0.5)
    assert (aquant.border, aquant_bert.border) == ("quadratic", "quadratic")
    assert aquant.border_granularity == aquant_bert.border_granularity == "element"
    assert {r.border_granularity for r in (nearest, adaround, brecq, qdrop)} == {"mean"}
    assert all(r.border is None for r in (nearest, adaround, brecq, qdrop))
    for r in (adaround, brecq, qdrop, aquant):
        assert (r.first_weight_bits, r.last_weight_bits, r.last_act_bits) == (8, 8, 8)
        learning = r.reconstruction
        assert (learning.rounding_weight, learning.beta_start, learning.beta_end) == (0.01, 20, 2)
        assert not r.quantize_input


def test_replace_gives_another_recipe():
    recipe = recipes.qdrop()
    other = recipe.replace(steps=3, weight_bits=5)
    assert (recipe.reconstruction.steps, other.reconstruction.steps) == (20_000, 3)
    assert (recipe.weight_bits, other.weight_bits) == (4, 5)
    assert other.reconstruction.quant_drop_prob == 0.5
    with pytest.raises(InputError, match=r"unknown recipe field 'stepz'; did you mean 'steps'"):
        recipe.replace(stepz=3)


def test_the_reconstruction_may_be_given_as_a_whole():
    learning = Reconstruction(steps=3, quant_drop_prob=0.25)
    assert recipes.qdrop(reconstruction=learning).reconstruction == learning
    assert recipes.qdrop(reconstruction=dataclasses.asdict(learning)).reconstruction == learning
    mixed = recipes.qdrop(reconstruction=learning, steps=4).reconstruction
    assert mixed == dataclasses.replace(learning, steps=4)
    with pytest.raises(InputError, match=r"unknown field 'reconstruction\.weight_bits'"):
        recipes.qdrop(reconstruction={"weight_bits": 3})
    with pytest.raises(InputError, match=r"reconstruction is 5; it must be a dict"):
        recipes.qdrop(reconstruction=5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("unit", "granularity"),
        ("fused", "border_granularity"),
        ("shared_across_taps", "border_granularity"),
        ("drop", "reconstruction.quant_drop_prob"),
        ("settle", "reconstruction.final_full_quant_fraction"),
    ],
)
def test_old_names_of_fields_say_the_new_ones(old, new):
    with pytest.raises(InputError, match=rf"unknown recipe field '{old}'; '{old}' is now '{new}'"):
        preset("qdrop", **{old: 0.5})


def test_a_border_that_depends_on_the_tap_is_refused_where_there_are_none(monkeypatch):
    monkeypatch.setattr(borders, "BORDERS", dict(borders.BORDERS))
    linear = borders.get("linear")
    aq.register_border("by_tap", linear.init, linear.apply, needs_taps=True)
    aq.register_border("any", linear.init, linear.apply)
    recipe = recipes.aquant(border="by_tap")
    message = "^border 'by_tap' depends on the tap; border_granularity 'channel' has no taps$"
    with pytest.raises(InputError, match=message):
        recipes.aquant(border="by_tap", border_granularity="channel")
    with pytest.raises(InputError, match=message):
        recipe.replace(border_granularity="channel")
    assert recipe.replace(border_granularity="mean").border == "by_tap"
    assert recipe.replace(border="any", border_granularity="channel").border == "any"


def test_overrides_may_be_dicts():
    recipe = recipes.qdrop(overrides=[{"pattern": "head", "keep_float": True}])
    assert recipe.overrides == (Override("head", keep_float=True),)
    assert hash(recipe)
    with pytest.raises(InputError, match=r"overrides: .*bitz.*fields: .*weight_bits"):
        recipes.qdrop(overrides=[{"pattern": "head", "bitz": 3}])


def test_unknown_names_list_what_exists():
    with pytest.raises(InputError, match=r"unknown preset 'aquont'.*nearest, adaround"):
        preset("aquont")
    with pytest.raises(InputError, match=r"unknown recipe field 'weigth_bits'.*'weight_bits'"):
        preset("qdrop", weigth_bits=3)
    with pytest.raises(InputError, match=r"unknown border 'cubic'; known: constant, linear"):
        recipes.aquant(border="cubic")
    with pytest.raises(InputError, match=r"unknown phi 'exp'; known: clamp"):
        recipes.aquant(phi="exp")


@pytest.mark.parametrize("bits", [1, 9, 0, -2, 2.5, True, "4"])
@pytest.mark.parametrize("field", ["weight_bits", "act_bits", "first_weight_bits", "last_act_bits"])
def test_bits_outside_two_to_eight(field, bits):
    with pytest.raises(InputError, match=rf"{field} is {bits!r}.*2 to 8"):
        preset("qdrop", **{field: bits})


def test_bits_of_an_override_outside_two_to_eight():
    with pytest.raises(InputError, match=r"overrides\['head'\].act_bits is 9"):
        recipes.qdrop(overrides=(Override("head", act_bits=9),))


def test_bits_may_be_whole_numbers_of_numpy():
    assert repr(recipes.qdrop(np.int64(2), act_bits=np.uint8(3))) == repr(recipes.qdrop(2, 3))


def test_optional_bits_may_be_none_and_the_others_may_not():
    assert recipes.qdrop(first_weight_bits=None, first_output_bits=None).first_weight_bits is None
    with pytest.raises(InputError, match="weight_bits is None"):
        Recipe(weight_bits=None)


BAD = [
    ("granularity", "stage", "granularity is 'stage'; known: block, layer"),
    (
        "border_granularity",
        "tensor",
        "border_granularity is 'tensor'; known: element, mean, channel",
    ),
    ("step_schedule", "linear", "step_schedule is 'linear'; known: constant, cosine"),
    ("border_schedule", "", "border_schedule is ''"),
    ("quant_drop_prob", 1.0, r"quant_drop_prob is 1.0; it must be in \[0, 1\)"),
    ("input_mixing", -0.1, "input_mixing is -0.1"),
    ("rounding_warmup", 1.5, "rounding_warmup is 1.5"),
    ("border_warmup", float("nan"), "border_warmup is nan"),
    ("batch_size", 0, "batch_size is 0; it must be positive"),
    ("weight_lr", -1e-3, "weight_lr is -0.001"),
    ("step_lr", float("nan"), "step_lr is nan"),
    ("loss_power", 0.0, "loss_power is 0.0"),
    ("init_samples", 0, "init_samples is 0"),
    ("steps", -1, "steps is -1; it must be 0 or more"),
    ("border_range", 0.0, "border_range is 0.0; it must be positive and finite"),
    ("border_range", -1.0, "border_range is -1.0"),
    ("border_gain", -1.0, "border_gain is -1.0"),
    ("weight_lr", float("inf"), "weight_lr is inf; it must be positive and finite"),
    ("border_range", 1e-300, "border_range is 1e-300; it must be positive and finite as a float32"),
    ("step_lr", 1e300, r"step_lr is 1e\+300; it must be positive and finite as a float32"),
    ("beta_end", -3.0, "beta_end is -3.0"),
    ("rounding_weight", -1.0, "rounding_weight is -1.0; it must be 0 or more"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD)
def test_values_out_of_range(field, value, message):
    with pytest.raises(InputError, match=message):
        preset("qdrop", **{field: value})


WRONG_TYPES = [
    ("steps", "10"), ("steps", 1.5), ("quant_drop_prob", "half"), ("batch_size", 2.5),
    ("border_granularity", True),
    ("blocks", "block_1"), ("overrides", Override("a")), ("rounding_weight", float("nan")),
    ("overrides", ({"pattern": 3},)), ("overrides", (5,)), ("overrides", ("abc",)),
    ("overrides", ({"pattern": "a", "keep_float": "yes"},)), ("border", [1]), ("border", 2),
    ("border_range", "a"), ("phi", None),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES)
def test_values_of_the_wrong_type(field, value):
    with pytest.raises(InputError, match=field):
        preset("qdrop", **{field: value})


def test_names_of_the_public_api():
    assert aq.recipes is recipes
    assert isinstance(aq.recipes.aquant(weight_bits=2, act_bits=2), aq.Recipe)
