import dataclasses
import re

import pytest
from absl import flags
from ml_collections import ConfigDict

import aquant_jax as aq
from aquant_jax import data, models
from aquant_jax.errors import InputError
from configs import imagenet, variants
from launch.lib import command_line, experiment
from tests.support.process import REPOSITORY

CONFIGS = sorted(
    path.relative_to(REPOSITORY)
    for path in (REPOSITORY / "configs").glob("*.py")
    if path.stem not in ("__init__", "variants", "imagenet", "glue")
)
BERT = [path for path in CONFIGS if path.stem in ("glue_bert", "stsb_minilm")]
CNNS = [path for path in CONFIGS if path not in BERT]
# Where a network has another recipe, as the paper and reference_procedures.md have it: borders of
# their own a tap, linear borders, lambda.
BORDER_PER_TAP = {"cifar10_resnet20", "digits"}
LINEAR = {"mobilenetv2", "mnasnet2", *(f"efficientnet_lite{n}" for n in range(3))}
LAMBDA = {"mobilenetv2": 0.1, "mnasnet2": 0.2}


@pytest.mark.parametrize("path", CNNS, ids=str)
def test_every_config_describes_a_run(path):
    config = command_line.load_config(str(path), {})
    assert config.model in models.MODELS
    assert config.dataset in (*data.DATASETS, *imagenet.DATASETS)
    assert config.weights == "embedded" or config.weights.startswith("weights/")
    assert (config.preset, config.recipe.weight_bits, config.recipe.act_bits) == ("aquant", 2, 2)


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_docstring_gives_number_cost_and_command(path):
    text = path.read_text()
    assert re.search(rf"--config={path}:\S+", text)
    assert all(f"\n{word}:" in text for word in ("Paper", "Float", "Ours", "Cost", "Command"))


@pytest.mark.parametrize("preset", ["adaround", "aquant_bert"])
def test_transformers_are_reconstructed_in_layers_or_their_halves(preset):
    def parts(blocks):
        config = command_line.load_config(f"configs/glue_bert.py:rte,preset={preset}{blocks}", {})
        return config.recipe.granularity, config.recipe.blocks

    assert parts("") == ("layer", ())
    assert parts(",blocks=layers") == ("block", ())
    granularity, halves = parts(",blocks=sub-blocks")
    assert granularity == "block"
    assert [bool(re.search(half, "layer_0/out/kernel")) for half in halves] == [True, False]


@pytest.mark.parametrize("path", CNNS, ids=str)
@pytest.mark.parametrize("preset", variants.PRESETS)
def test_a_variant_sets_bits_and_preset(path, preset):
    config = command_line.load_config(f"{path}:w2a4,preset={preset}", {})
    recipe = aq.recipes.preset(config.preset, **config.recipe.to_dict())
    expected = aq.recipes.preset(
        preset,
        weight_bits=2,
        act_bits=4,
        steps=recipe.reconstruction.steps,
        rounding_weight=LAMBDA.get(path.stem, 0.01),
        finetune_loss="kl",
    )
    if preset in ("aquant", "aquant_plus"):
        form = "linear" if path.stem in LINEAR else "quadratic"
        expected = expected.replace(
            border=form,
            border_granularity="element" if path.stem in BORDER_PER_TAP else "mean",
        )
    assert recipe == expected
    assert (recipe.reconstruction.steps == 0) == (preset == "nearest")


@pytest.mark.parametrize("path", CONFIGS, ids=str)
@pytest.mark.parametrize("variant", ["", ":w4a4,preset=adaround"])
def test_the_hint_for_a_preset_is_a_config(path, variant):
    with pytest.raises(InputError, match="name the preset in the variant: ") as caught:
        command_line.load_config(f"{path}{variant}", {"preset": "nearest"})
    config = command_line.load_config(str(caught.value).rpartition(" ")[2], {})
    assert config.preset == "nearest"
    assert not variant or config.recipe.weight_bits == 4


def test_an_empty_part_is_the_default():
    assert variants.parse("", preset=("a", "b")) == variants.Variant(2, 2, {"preset": "a"})
    assert variants.parse("w4a4,", preset=("a", "b")).weight_bits == 4


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("w9a9", r"unknown variant 'w9a9'; there are .*w2a2"),
        ("w2a2,preset=gptq", r"unknown preset 'gptq'; there are aquant.*qdrop"),
        ("w2a2,colour=red", r"unknown key 'colour'.*preset"),
        ("w2a2,w4a4", r"bits is given twice: w2a2 and w4a4"),
        ("preset=qdrop,preset=brecq", r"preset is given twice: qdrop and brecq"),
    ],
)
def test_wrong_variants_list_what_exists(variant, message):
    with pytest.raises(InputError, match=message):
        command_line.load_config(f"configs/digits.py:{variant}", {})


def test_the_cifar_config_takes_the_lossless_set():
    config = command_line.load_config("configs/cifar10_resnet20.py:w4a4,dataset=cifar10", {})
    assert config.dataset == "cifar10"


def test_overrides_reach_any_field():
    steps = "recipe.reconstruction.steps"
    overrides = {steps: "7", "test_limit": "100", "eval_batch_size": "50"}
    config = command_line.load_config("configs/digits.py", overrides)
    assert config.recipe.reconstruction.steps == 7
    assert (config.test_limit, config.eval_batch_size) == (100, 50)
    overrides = {"recipe.border": "linear", "recipe.reconstruction.border_range": "none"}
    overrides["recipe.border_granularity"] = "channel"
    config = command_line.load_config("configs/digits.py", overrides)
    recipe = experiment.recipe_of(config)
    assert (recipe.border, recipe.border_granularity) == ("linear", "channel")
    assert recipe.reconstruction.border_range is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"recipe.phii": "clamp"}, r"no field 'recipe.phii'; did you mean 'phi'\? there are act_"),
        ({"recipe.stesp": "7"}, r"no field 'recipe.stesp'; did you mean 'reconstruction.steps'"),
        ({"recipes.steps": "7"}, r"no field 'recipes.steps'; there are .*recipe"),
        ({"recipe": "7"}, r"recipe is a section; set its fields: recipe.act_bits"),
        ({"recipe.blocks": ""}, r"recipe.blocks is a list; it cannot become ''"),
        ({"preset": "qdorp"}, r"unknown preset 'qdorp'; there are aquant.*qdrop"),
    ],
)
def test_wrong_overrides_name_the_field(overrides, message):
    with pytest.raises(InputError, match=message):
        command_line.load_config("configs/digits.py", overrides)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("recipe.reconstruction.steps", "many"),
        ("recipe.reconstruction.steps", "2.5"),
        ("recipe.reconstruction.weight_lr", "fast"),
        ("recipe.quantize_input", "3"),
    ],
)
def test_values_of_a_wrong_type_are_named(field, text):
    with pytest.raises(flags.Error, match=f"flag --config.{field}={text}: .*{text}"):
        command_line.load_config("configs/digits.py", {field: text})


def test_a_list_of_no_regular_expressions():
    config = command_line.load_config("configs/digits.py", {"recipe.blocks": "3"})
    with pytest.raises(InputError, match="3 is not a regular expression"):
        experiment.recipe_of(config)


RENAMED = {
    "unit": "granularity",
    "fused": "border_granularity",
    "shared_across_taps": "border_granularity",
    "drop": "reconstruction.quant_drop_prob",
    "settle": "reconstruction.final_full_quant_fraction",
}


@pytest.mark.parametrize("name", RENAMED)
def test_an_old_name_of_a_field_gives_the_new_one(name):
    message = f"no field 'recipe.{name}'; '{name}' is now '{RENAMED[name]}'"
    with pytest.raises(InputError, match=message):
        command_line.load_config("configs/digits.py", {f"recipe.{name}": "1"})


@pytest.mark.parametrize("field", dataclasses.fields(aq.Reconstruction), ids=lambda f: f.name)
def test_a_field_that_moved_says_where_it_is(field):
    message = f"no field 'recipe.{field.name}'; it is now 'recipe.reconstruction.{field.name}'"
    with pytest.raises(InputError, match=message):
        command_line.load_config("configs/digits.py", {f"recipe.{field.name}": "1"})


def test_rules_are_written_as_a_list():
    rules = "[{'pattern': 'stem', 'weight_bits': 4}]"
    config = command_line.load_config("configs/digits.py", {"recipe.overrides": rules})
    recipe = aq.recipes.preset(config.preset, **config.recipe.to_dict())
    assert [(rule.pattern, rule.weight_bits) for rule in recipe.overrides] == [("stem", 4)]


def test_none_fields_take_a_value_and_values_take_none():
    config = ConfigDict({"a": None, "b": 3, "flag": True, "text": "x", "rate": 1.0, "c": 4})
    given = {"a": "5", "flag": "false", "text": "12", "rate": "2", "c": "None"}
    command_line.override(config, given)
    found = {"a": 5, "b": 3, "flag": False, "text": "12", "rate": 2.0, "c": None}
    assert config.to_dict() == found
    command_line.override(config, {"a": "none", "text": "none", "c": "[1, 2]"})
    assert config.to_dict() == found | {"a": None, "text": "none", "c": [1, 2]}


def test_a_config_takes_no_new_field():
    config = command_line.load_config("configs/digits.py", {})
    with pytest.raises(AttributeError, match="test_limits"):
        config.test_limits = 3


def test_split_overrides_takes_both_spellings():
    argv = ["prog", "--config=c.py", "--config.a.b=1", "--config.c", "2", "--seed=3"]
    assert command_line.split_overrides(argv) == (
        ["prog", "--config=c.py", "--seed=3"],
        {"a.b": "1", "c": "2"},
    )
    with pytest.raises(InputError, match=r"--config\.a lacks a value"):
        command_line.split_overrides(["prog", "--config.a", "--seed=3"])


def test_the_last_of_several_values_of_a_field_counts():
    argv = ["prog", "--config.a=1", "--config.b=2", "--config.a=3"]
    assert command_line.split_overrides(argv)[1] == {"b": "2", "a": "3"}


def test_missing_config_file():
    with pytest.raises(InputError, match=r"no config file 'configs/nothing\.py'"):
        command_line.load_config("configs/nothing.py:w2a2", {})
    with pytest.raises(InputError, match=r"file 'digits'; did you mean configs/digits\.py\?$"):
        command_line.load_config("digits:w2a2", {})


@pytest.mark.parametrize("field", ["reconstruction.steps", "weight_bits"])
def test_a_field_of_the_recipe_without_its_section(field):
    name = field.split(".")[-1]
    with pytest.raises(InputError, match=rf"field '{name}'; did you mean 'recipe\.{field}'\?$"):
        command_line.load_config("configs/digits.py", {name: "3"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "X is not a Python file: invalid syntax"),
        ("x = 1", "X defines no get_config"),
        ("import nothing_here", "X raises ModuleNotFoundError: No module named 'nothing_here'"),
        ("1 / 0", "X raises ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(0)", "X raises SystemExit: 0"),
        ("def get_config(): pass", r"X raises TypeError: get_config\(\) takes 0"),
        ("get_config = 3", "X raises TypeError: 'int' object is not callable"),
        ("def get_config(argument): return {'model': 'x'}", "of X returns dict, not a ConfigDict"),
        (
            "import ml_collections\ndef get_config(argument):\n"
            "    return ml_collections.ConfigDict({'model': 'x', 'recipe': {}})",
            "of X lacks weights, dataset, calibration_size, test_limit, eval_batch_size, preset",
        ),
    ],
)
def test_a_file_that_is_no_config(tmp_path, text, message):
    command_line.load_config("configs/digits.py", {})  # whose get_config is not that of the next
    (tmp_path / "config.py").write_text(text)
    message = message.replace("X", str(tmp_path / "config.py"))
    with pytest.raises(InputError, match=message):
        command_line.load_config(str(tmp_path / "config.py"), {})


def test_a_set_without_training_images_is_calibrated_on_another_one():
    sample = command_line.load_config("configs/efficientnet_lite0.py", {})
    assert (sample.calibration_dataset, sample.calibration_size) == ("imagenet_sample_1000", 1000)
    assert sample.preprocessing.geometry == "squash"
    whole = command_line.load_config("configs/efficientnet_lite0.py:dataset=imagenet2012", {})
    assert (whole.calibration_dataset, whole.calibration_size) == ("imagenet2012", 1024)
    assert whole.preprocessing.geometry == "crop_resize"


@pytest.mark.parametrize(("number", "side"), [(0, 224), (1, 240), (2, 260)])
def test_every_efficientnet_lite_has_images_of_its_own_size(number, side):
    path = f"configs/efficientnet_lite{number}.py"
    sample = command_line.load_config(path, {})
    assert (sample.preprocessing.size, sample.preprocessing.geometry) == (side, "squash")
    whole = command_line.load_config(f"{path}:dataset=imagenet2012", {})
    assert (whole.preprocessing.size, whole.preprocessing.resize) == (side, side + 32)
