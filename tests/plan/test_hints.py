"""What a new user passes by mistake: one line that names it, and what to pass."""

import inspect

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import aquant_jax as aq
from aquant_jax.plan import checks
from tests.support.nets import normal, rng_of

X = normal(rng_of(0), 16, 6)
V = {"kernel": normal(rng_of(1), 6, 4), "bias": normal(rng_of(2), 1, 4)}
RECIPE = aq.recipes.nearest(8, 8, batch_size=8)
ORDER = r"the order is quantize\(apply, variables, calibration, recipe\)$"


def dense(v, x):
    return x @ v["kernel"] + v["bias"]


class Module(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x)


class Training(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.Dropout(0.5, deterministic=False)(x))


class Keras:
    """A class of its package, whose import would take seconds."""

    __module__ = "keras.src.models.sequential"

    def __call__(self, x):
        return x


MISTAKES = {
    "nnx module": (Module(), V, X, r"takes 2 .* but 3 were given; apply is a Module, .*nnx\.split"),
    "linen module": (Linen(), V, X, r"; apply is a Linen, .*: apply = module\.apply$"),
    "keras model": (Keras(), V, X, r"; apply is a Keras, .* model\.stateless_call\(\*variables, x"),
    "variables first": (V, dense, X, rf"^apply is of type dict; it must be a function .*; {ORDER}"),
    "labels": (dense, V, (X, np.ones(16, np.float32)), r"is a tuple of 2: .*, without labels$"),
    "a list of samples": (
        dense, V, list(X),
        r"'float32\[6\]', '8 more'\]: .*; calibration is a list of 16: .* np\.stack\(",
    ),
    "swapped": (dense, X, {"kernel": X}, rf"; variables is one array and .* a dict: {ORDER}"),
    "swapped, as many": (dense, X, {"a": V}, rf"counts: .*'a/kernel': 6.*; {ORDER}"),
    "swapped, few": (dense, X, {"b": np.ones(1)}, rf"has 1 samples; .* \(batch_size\); {ORDER}"),
    "swapped, with keys": (
        dense, X, {"rngs": {"key": jax.random.key(0)}},
        rf"^calibration/rngs/key has dtype key<fry>, which is not one of numbers; .*: {ORDER}",
    ),
    "one sample": (
        lambda v, x: x.reshape(x.shape[0], 6, 2) @ v["kernel"][:2], V, X,
        r"^apply\(variables, x\) fails for x of \['float32\[8, 6\]'\]: cannot reshape .*; "
        r"axis 0 of calibration must number the samples, of which it has 16$",
    ),
    "training mode": (
        Training().apply, {"params": {"Dense_0": {"kernel": V["kernel"], "bias": np.ones(4)}}}, X,
        r"needs PRNG for \"dropout\" .*; the network must be in inference mode, such as train",
    ),
    "branch on values": (lambda v, x: dense(v, x) if x.sum() else x, V, X, r"BoolConversionError$"),
    "no such weight": (lambda v, x: x @ v["kernle"], V, X, r"\['float32\[8, 6\]'\]: 'kernle'$"),
    "fixed batch": (
        lambda v, x: dense(v, x.reshape(8, 6)), V, X,
        r"^the network takes 8 samples; it must take any number: apply\(variables, x\) fails for",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_pass(name):
    apply, variables, calibration, words = MISTAKES[name]
    prepare = inspect.unwrap(aq.prepare)  # the tests' checks of annotations would come first
    with pytest.raises(aq.InputError, match=words) as caught:
        prepare(apply, variables, calibration, RECIPE)
    assert "\n" not in str(caught.value)


def test_the_error_of_the_function_is_the_cause():
    def apply(v, x):
        raise TypeError("a shape\nsecond line")

    with pytest.raises(aq.InputError, match=r"a shape second line; axis 0") as caught:
        aq.prepare(apply, V, X, RECIPE)
    assert isinstance(caught.value.__cause__, TypeError)


def test_what_the_hint_for_nnx_says_works():
    graphdef, state = nnx.split(Module())
    net = aq.prepare(lambda state, x: nnx.merge(graphdef, state)(x), state, X, RECIPE)
    assert list(net.folded) == ["layer/kernel"]


def test_inputs_with_the_names_of_weights_may_have_any_order():
    """Data that are called `b` are no mistake unless something is wrong with them."""
    net = aq.prepare(lambda v, x: dense(v, x["b"]), V, {"b": X}, RECIPE)
    assert net.samples == 16


def test_a_mask_that_is_no_path_and_what_has_a_recipe():
    prepare, leaf = map(inspect.unwrap, (aq.prepare, checks.leaf))
    with pytest.raises(aq.InputError, match=r"^mask is of type ndarray; .* path of a leaf"):
        leaf(X, np.ones((16, 6)))
    with pytest.raises(aq.InputError, match=r"^recipe is of type Network; .*the \.recipe of this"):
        prepare(dense, V, X, aq.prepare(dense, V, X, RECIPE))
