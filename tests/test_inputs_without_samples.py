"""Scalars among the inputs, and outputs that belong to no sample: a step of a decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import aquant_jax as aq
import gpu_ops
from tests.support.nets import normal, relative_error, rng_of

COMPILER = aq.Compiler()
BATCH, LENGTH, WIDTH = 8, 6, 12
SHAPES = {
    "in": (WIDTH, WIDTH), "place": (LENGTH, WIDTH), "router": (WIDTH, 3), "mid": (WIDTH, WIDTH),
    "head": (WIDTH, 5),
}  # fmt: skip
V = {
    name: jnp.asarray(normal(rng_of(i), *shape) * np.float32(shape[0] ** -0.5))
    for i, (name, shape) in enumerate(SHAPES.items(), 1)
}
X = {
    "cache": normal(rng_of(8), 4 * BATCH, LENGTH, WIDTH),
    "gain": np.float32(1.5),
    "index": 3,
    "x": normal(rng_of(9), 4 * BATCH, WIDTH),
}


def decode(v, x):
    h = jax.nn.relu(x["x"] @ v["in"]) + v["place"][x["index"]][None]
    shares = jax.nn.softmax(h @ v["router"])
    cache = lax.dynamic_update_slice_in_dim(x["cache"], h[:, None], x["index"], 1)
    logits = (h + jax.nn.relu(h @ v["mid"]) * x["gain"]) @ v["head"]
    aux = {"load": shares.sum(0), "loss": (shares.mean(0) ** 2).sum()}
    return {"aux": aux, "cache": cache, "index": x["index"] + 1, "logits": logits}


def quantize(recipe, apply=decode, calibration=X):
    recipe = recipe.replace(batch_size=BATCH)
    return aq.quantize(apply, V, calibration, recipe, observer=aq.Observer(), compiler=COMPILER)


def test_a_description_names_the_outputs_that_are_no_target():
    net = aq.prepare(decode, V, X, aq.recipes.nearest(8, 8, batch_size=BATCH))
    *_, named, _, covered = aq.describe(net).splitlines()
    assert named == "outputs without samples, which are no target: aux/load, aux/loss"
    reason = "router (dot_general: no output with samples depends on it)"
    assert covered == f"3 of 4 weighted ops quantized; float: {reason}"
    assert [layer for block in net.blocks for layer in block.layers] == ["in", "mid", "head"]


def test_a_step_of_a_decoder_is_quantized_saved_and_run_in_integers(tmp_path):
    quantized, wanted = quantize(aq.recipes.nearest(8, 8)), decode(V, X)
    found = quantized(X)
    assert relative_error(found["logits"], wanted["logits"]) < 0.02
    assert relative_error(found["aux"]["load"], wanted["aux"]["load"]) < 0.02
    assert relative_error(found["cache"], wanted["cache"]) < 0.02
    later = {**X, "index": 5}
    assert quantized(later)["index"] == 6
    aq.save(quantized, tmp_path / "saved")
    for other in (aq.restore(tmp_path / "saved"), quantized.with_backend(gpu_ops.backend())):
        jax.tree.map(np.testing.assert_array_equal, other(later), quantized(later))


def test_all_stages_learn_from_it():
    learned = aq.recipes.aquant(4, 4, steps=20).replace(finetune_steps=4)
    wanted, nearest = decode(V, X), quantize(aq.recipes.nearest(4, 4))
    better = relative_error(quantize(learned)(X)["logits"], wanted["logits"])
    assert better < relative_error(nearest(X)["logits"], wanted["logits"])


def test_layers_are_compared_by_the_outputs_with_samples():
    entries = aq.sensitivity(decode, V, X, aq.recipes.nearest(4, 4))
    assert sorted(entry.path for entry in entries) == ["head", "in", "mid"]


def test_activations_of_a_part_without_samples_are_not_quantized():
    def apply(v, x):
        h = jax.nn.relu(x["x"] @ v["in"])
        return h @ v["head"], (h @ (h.T @ h)).sum()

    recipe = aq.recipes.nearest(8, 8).replace(activations=("matmul", "sum"))
    quantized = quantize(recipe, apply)
    assert list(quantized.activations) == ["head"]  # the operands of the other products are not
    for found, wanted in zip(quantized(X), apply(V, X), strict=True):
        assert relative_error(found, wanted) < 0.02


@pytest.mark.parametrize(
    ("apply", "calibration", "message"),
    [
        (lambda v, x: decode(v, x)["aux"], X, r"have the shapes \(3,\), \(\) for any number of"),
        (decode, {"index": 3, "gain": 1.0}, "the calibration set has only scalars; samples are"),
        (lambda v, x: (x["x"] @ v["in"]).T, X, "must have the samples on the first axis"),
    ],
)
def test_one_line_says_what_has_no_samples(apply, calibration, message):
    with pytest.raises(aq.InputError, match=message) as caught:
        quantize(aq.recipes.nearest(8, 8), apply, calibration)
    assert "\n" not in str(caught.value)
