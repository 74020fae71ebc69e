"""Padding counts neither in losses nor in the search of step sizes."""

import jax
import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax.errors import InputError
from aquant_jax.models.bert import Bert
from tests.graph.test_activation_rules import CONFIG, LENGTH, bert, recipe, tokens
from tests.support.nets import normal, rng_of

STEPS = {"steps": 4, "batch_size": 8, "init_samples": 16}
COMPILER = aq.Compiler()
BORDERS = {"granularity": "block", "border": "quadratic"}
LEARNED = {
    **BORDERS, "finetune_steps": 12, "finetune_eval_every": 3, "finetune_lr": 1e-3,
    "finetune_held_out": 0.3,
}  # fmt: skip


def pooled():
    """Three layers at every position, and their mean over what is no padding."""
    rng = rng_of(2)
    variables = {name: normal(rng, 6, 6) for name in ("a", "b", "head")}

    def apply(v, x):
        h = jax.nn.relu(jax.nn.relu(x["x"] @ v["a"]) @ v["b"])
        mask = x["mask"].astype(np.float32)
        y = h @ v["head"]
        return {"all": y, "mean": (y * mask[..., None]).sum(1) / mask.sum(1)[:, None]}

    return apply, variables


def rows():
    return {"x": normal(rng_of(3), 16, LENGTH, 6), "mask": tokens()["mask"]}


def padded_with(x, token):
    """Other words, or other activations, where the mask is 0."""
    (name,) = {"ids", "x"} & x.keys()
    mask = x["mask"].reshape(x["mask"].shape + (1,) * (x[name].ndim - 2))
    return {**x, name: np.where(mask == 1, x[name], token).astype(x[name].dtype)}


def quantize(x, mask, **fields):
    apply, variables = bert(layers=1) if "ids" in x else pooled()
    chosen = recipe(**STEPS | fields)
    return aq.quantize(
        apply, variables, x, chosen, mask=mask, observer=aq.Observer(), compiler=COMPILER
    )


def state(quantized):
    return jax.tree.leaves((quantized.layers, quantized.activations))


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (tokens, {"steps": 0}),
        (rows, LEARNED),
        pytest.param(tokens, {"granularity": "layer"}, marks=pytest.mark.slow),
        pytest.param(tokens, BORDERS, marks=pytest.mark.slow),
    ],
    ids=["bert", "learned", "bert by layers", "bert by blocks"],
)
def test_what_stands_in_the_padding_has_no_influence(make, fields):
    x = make()
    one, two = (quantize(padded_with(x, t), "mask", **fields) for t in (0, 29))
    for a, b in zip(state(one), state(two), strict=True):
        np.testing.assert_array_equal(a, b)
    errors = [[report.final_error for report in q.reports] for q in (one, two)]
    np.testing.assert_allclose(*errors, rtol=1e-6)
    if fields is LEARNED:
        assert one.reports[-1].best_step


def test_without_a_mask_it_has():
    x = rows()
    one, two = (quantize(padded_with(x, t), None, steps=0) for t in (0, 29))
    differ = [np.any(a != b) for a, b in zip(state(one), state(two), strict=True)]
    assert any(differ)


def test_a_mask_of_ones_changes_nothing():
    x = rows()
    x = {**x, "mask": np.ones_like(x["mask"])}
    one, two = (quantize(x, mask, **LEARNED) for mask in ("mask", None))
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
