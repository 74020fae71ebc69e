import re

import pytest
from ml_collections import ConfigDict

import aquant_jax as aq
from aquant_jax import data, models
from aquant_jax.errors import InputError
from configs import imagenet, variants
from launch.lib import command_line
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
NOT_FUSED = {"cifar10_resnet20", "digits"}
LINEAR = {"mobilenetv2", "mnasnet2", "efficientnet_lite0"}
LAMBDA = {"mobilenetv2": 0.1, "mnasnet2": 0.2}


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


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
    def units(blocks):
        config = command_line.load_config(f"configs/glue_bert.py:rte,preset={preset}{blocks}", {})
        return config.recipe.get("unit"), config.recipe.blocks

    assert units("") == ("layer", ())
    assert units(",blocks=layers") == ("block", ())
    unit, halves = units(",blocks=sub-blocks")
    assert unit == "block"
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
        steps=recipe.steps,
        rounding_weight=LAMBDA.get(path.stem, 0.01),
    )
    if preset == "aquant":
        form = "linear" if path.stem in LINEAR else "quadratic"
        expected = expected.replace(border=form, fused=path.stem not in NOT_FUSED)
    assert recipe == expected
    assert (recipe.steps == 0) == (preset == "nearest")


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
    overrides = {"recipe.steps": "7", "test_limit": "100", "eval_batch_size": "50"}
    config = command_line.load_config("configs/digits.py", overrides)
    assert (config.recipe.steps, config.test_limit, config.eval_batch_size) == (7, 100, 50)
    assert command_line.load_config(
        "configs/digits.py", {"recipe.border": "linear"}
    ).recipe.border == ("linear")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"recipe.stesp": "7"}, r"no field 'recipe.stesp'; there are .*steps"),
        ({"recipes.steps": "7"}, r"no field 'recipes.steps'; there are .*recipe"),
        ({"recipe.steps": "many"}, r"recipe.steps is .* cannot become 'many'"),
        ({"recipe.fused": "3"}, r"recipe.fused is .* cannot become '3'"),
        ({"recipe.blocks": "3"}, r"recipe.blocks is .* cannot become '3'"),
        ({"preset": "qdrop"}, r"name the preset in the variant"),
    ],
)
def test_wrong_overrides_name_the_field(overrides, message):
    with pytest.raises(InputError, match=message):
        command_line.load_config("configs/digits.py", overrides)


def test_rules_are_written_as_a_list():
    rules = "[{'pattern': 'stem', 'weight_bits': 4}]"
    config = command_line.load_config("configs/digits.py", {"recipe.overrides": rules})
    recipe = aq.recipes.preset(config.preset, **config.recipe.to_dict())
    assert [(rule.pattern, rule.weight_bits) for rule in recipe.overrides] == [("stem", 4)]


def test_none_fields_take_a_value_and_values_take_none():
    config = ConfigDict({"a": None, "b": 3, "flag": True, "text": "x", "rate": 1.0})
    for field, text in {"a": "5", "flag": "false", "text": "12", "rate": "2"}.items():
        command_line._override(config, field, text)
    assert config.to_dict() == {"a": 5, "b": 3, "flag": False, "text": "12", "rate": 2.0}


def test_split_overrides_takes_both_spellings():
    argv = ["prog", "--config=c.py", "--config.a.b=1", "--config.c", "2", "--seed=3"]
    assert command_line.split_overrides(argv) == (
        ["prog", "--config=c.py", "--seed=3"],
        {"a.b": "1", "c": "2"},
    )


def test_missing_config_file():
    with pytest.raises(InputError, match=r"no config file 'configs/nothing\.py'"):
        command_line.load_config("configs/nothing.py:w2a2", {})


def test_a_set_without_training_images_is_calibrated_on_another_one():
    sample = command_line.load_config("configs/efficientnet_lite0.py", {})
    assert (sample.calibration_dataset, sample.calibration_size) == ("imagenet_sample_1000", 1000)
    assert sample.preprocessing.geometry == "squash"
    whole = command_line.load_config("configs/efficientnet_lite0.py:dataset=imagenet2012", {})
    assert (whole.calibration_dataset, whole.calibration_size) == ("imagenet2012", 1024)
    assert whole.preprocessing.geometry == "crop_resize"
