"""Padding counts neither in losses nor in the search of step sizes."""

import functools

import jax
import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax.errors import InputError
from aquant_jax.models.bert import Bert
from tests.graph.test_activation_rules import CONFIG, LENGTH, recipe, tokens
from tests.graph.test_activation_rules import bert as build

STEPS = {"steps": 20, "batch_size": 8, "init_samples": 16}
COMPILER = aq.Compiler()
BORDERS = {"granularity": "block", "border": "quadratic"}
bert = functools.cache(build)


def padded_with(x, token):
    return {**x, "ids": np.where(x["mask"] == 1, x["ids"], token).astype(np.int32)}


def quantize(x, mask, **fields):
    apply, variables = bert(layers=1)
    chosen = recipe(**STEPS | fields)
    return aq.quantize(
        apply, variables, x, chosen, mask=mask, observer=aq.Observer(), compiler=COMPILER
    )


def state(quantized):
    return jax.tree.leaves((quantized.layers, quantized.activations))


@pytest.mark.parametrize(
    "fields",
    [pytest.param({"granularity": "layer"}, marks=pytest.mark.slow), BORDERS],
    ids=["layer", "block"],
)
def test_what_stands_in_the_padding_has_no_influence(fields):
    x = tokens()
    one, two = (quantize(padded_with(x, t), "mask", **fields) for t in (0, 29))
    for a, b in zip(state(one), state(two), strict=True):
        np.testing.assert_array_equal(a, b)
    errors = [[report.final_error for report in q.reports] for q in (one, two)]
    np.testing.assert_allclose(*errors, rtol=1e-6)


def test_what_stands_in_the_padding_has_no_influence_on_the_whole_network_stage():
    x = tokens()
    stage = {"granularity": "layer", "steps": 0, "finetune_steps": 3, "finetune_held_out": 0.3}
    one, two = (quantize(padded_with(x, t), "mask", **stage) for t in (0, 29))
    assert one.reports[-1].best_step == 3
    for a, b in zip(state(one), state(two), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_a_mask_it_has():
    x = tokens()
    one, two = (quantize(padded_with(x, t), None, steps=0) for t in (0, 29))
    differ = [np.any(a != b) for a, b in zip(state(one), state(two), strict=True)]
    assert any(differ)


def test_a_mask_of_ones_changes_nothing():
    x = tokens()
    x = {**x, "mask": np.ones_like(x["mask"])}
    one, two = (quantize(x, mask, **BORDERS) for mask in ("mask", None))
    for a, b in zip(state(one), state(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_mean_over_what_is_no_padding():
    # Twice as many positions, the second half of them padding: the same errors.
    x = tokens()
    x = {**x, "mask": np.ones_like(x["mask"])}
    wide = {name: np.pad(leaf, ((0, 0), (0, LENGTH))) for name, leaf in x.items()}
    one, two = (quantize(leaf, "mask", steps=0) for leaf in (x, wide))
    for a, b in zip(one.reports, two.reports, strict=True):
        assert a.final_error == pytest.approx(b.final_error, rel=1e-4)


def prepare(x, mask, model=None):
    apply, variables = bert() if model is None else model
    return aq.prepare(apply, variables, x, recipe(), mask)


def fixed_length():
    model = Bert(CONFIG)
    variables = bert()[1]

    def apply(variables, x):
        if x["ids"].shape[1] != LENGTH:
            raise ValueError("only that length")
        return model.apply(variables, x)

    return apply, variables


@pytest.mark.parametrize(
    ("mask", "spoil", "message"),
    [
        ("maks", {}, r"no leaf 'maks'; there are 'ids', 'mask', 'types'"),
        ("ids", {}, r"mask 'ids' holds \d+; it must be 1 for what counts, 0 for padding"),
        ("mask", {"mask": np.zeros((16, LENGTH), np.int32)}, r"leaves nothing of sample 0"),
        ("extra", {"extra": np.zeros(16, np.int32)}, r"mask 'extra' has shape \(16,\)"),
        ("extra", {"extra": np.ones((16, 3), np.int32)}, r"no activation has its 3 positions"),
    ],
)
def test_a_wrong_mask_is_named(mask, spoil, message):
    with pytest.raises(InputError, match=message):
        prepare({**tokens(), **spoil}, mask)


def test_a_network_of_one_length_is_named():
    with pytest.raises(InputError, match=r"sequences of 3 instead of 4, and it does not take"):
        prepare(tokens(), "mask", fixed_length())
