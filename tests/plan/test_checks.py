import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax.errors import InputError
from aquant_jax.plan.checks import check_calibration, check_variables
from tests.support.nets import images, mlp, normal, residual_net, rng_of

NEAREST = aq.recipes.nearest(batch_size=8)


def quantize(variables=None, calibration=None, recipe=NEAREST, net=None):
    apply, own = net or residual_net()
    calibration = images(0, 8) if calibration is None else calibration
    return aq.quantize(apply, own if variables is None else variables, calibration, recipe,
                       observer=aq.Observer())  # fmt: skip


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(value):
    _, variables = residual_net()
    variables["block_1"]["conv2"]["var"][2] = value
    with pytest.raises(InputError, match=r"variables/block_1/conv2/var has 1 of 4 values .*NaN"):
        quantize(variables)


def test_half_precision_weights_that_are_not_finite_are_named():
    weight = jnp.asarray([[1.0, np.nan]], jnp.bfloat16)
    with pytest.raises(InputError, match=r"variables/w has 1 of 2"):
        check_variables({"w": weight, "table": np.arange(3)})


def test_calibration_that_is_not_finite_is_named():
    x = images(0, 8)
    x[3, 0, 0, :2] = np.nan
    with pytest.raises(InputError, match=r"2 of 864 values .* or infinite, the first in sample 3$"):
        quantize(calibration=x)
    with pytest.raises(InputError, match=r"calibration/right has 2 of"):
        check_calibration({"left": images(0, 8), "right": x}, NEAREST)


def test_empty_and_too_small_calibration_sets():
    with pytest.raises(InputError, match=r"has 0 samples; the recipe needs at least 2"):
        quantize(calibration=images(0, 8)[:0])
    with pytest.raises(InputError, match=r"has 1 samples; the recipe needs at least 2"):
        quantize(calibration=images(0, 1))
    with pytest.raises(InputError, match=r"has 8 samples; the recipe needs at least 32"):
        quantize(recipe=aq.recipes.qdrop(steps=1, batch_size=32))
    with pytest.raises(InputError, match="empty pytree"):
        quantize(calibration={})


def test_empty_variables():
    with pytest.raises(InputError, match="variables is an empty pytree"):
        quantize(variables={})


def test_variables_that_are_no_numbers_are_named():
    _, variables = residual_net()
    with pytest.raises(InputError, match="variables/name"):
        quantize(variables={**variables, "name": "resnet"})


def test_calibration_leaves_that_do_not_fit_together():
    with pytest.raises(InputError, match=r"different sample counts: \{'a': 8, 'b': 7\}"):
        check_calibration({"a": images(0, 8), "b": images(0, 7)}, NEAREST)
    assert check_calibration({"a": np.float32(1.0), "b": images(0, 8)}, NEAREST) == 8
    with pytest.raises(InputError, match="the calibration set has only scalars"):
        check_calibration({"a": np.float32(1.0)}, NEAREST)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128, np.longdouble, object])
def test_wrong_dtypes_of_the_calibration_set_are_named(dtype):
    with pytest.raises(InputError, match=rf"calibration.* {np.dtype(dtype)}"):
        quantize(calibration=images(0, 8).astype(dtype))


@pytest.mark.parametrize("values", [np.array(["a"] * 8), np.zeros(8, "datetime64[s]")])
def test_what_holds_no_numbers_is_named(values):
    with pytest.raises(InputError, match="calibration has dtype"):
        quantize(calibration=values)
    variables = residual_net()[1]
    with pytest.raises(InputError, match=r"variables/name has dtype .*, which is not one of"):
        quantize({**variables, "name": values})


def test_a_seed_below_zero_is_an_error():
    with pytest.raises(InputError, match="seed is -1"):
        aq.quantize(*residual_net(), images(0, 8), NEAREST, seed=-1, observer=aq.Observer())


@pytest.mark.user_model
@pytest.mark.parametrize(
    ("preset", "broken"),
    [
        ("nearest", lambda h: jnp.log(-1 - h)),
        ("qdrop", lambda h: jnp.log(-1 - h)),
        ("qdrop", lambda h: jnp.exp(1e3 * h)),
    ],
    ids=["nearest", "nan", "inf"],
)
def test_a_network_that_is_not_finite_inside_is_named(preset, broken):
    def apply(v, x):
        return broken(jax.nn.relu(x @ v["a"])) @ v["b"]

    variables = {"a": normal(rng_of(0), 3, 4), "b": normal(rng_of(1), 4, 2)}
    steps = {} if preset == "nearest" else {"steps": 1}
    recipe = getattr(aq.recipes, preset)(2, 2, batch_size=8, **steps)
    words = r"^a: the float network itself computes NaN or infinity here, first for .* sample \d"
    with pytest.raises(aq.ReconstructionError, match=words):
        quantize(variables, normal(rng_of(2), 8, 3), recipe, (apply, None))


@pytest.mark.parametrize(
    ("calibration", "text"),
    [
        (images(0, 8)[0], r"float32\[6, 6, 3\]"),
        (images(0, 8)[..., 0], r"float32\[8, 6, 6\]"),
        (images(0, 8).astype(np.int32), "int32"),
        (images(0, 8, channels=4), r"float32\[8, 6, 6, 4\]"),
    ],
    ids=["rank 3 of one image", "rank 3", "integers", "channels"],
)
def test_calibration_that_the_network_does_not_take(calibration, text):
    with pytest.raises(InputError, match=text):
        quantize(calibration=calibration)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_float_dtypes_are_welcome(dtype):
    assert check_calibration(jnp.asarray(images(0, 8), dtype), NEAREST) == 8


def test_tokens_may_be_of_numpys_own_integer_type():
    def apply(v, tokens):
        h = jnp.take(v["table"], tokens, axis=0)
        return h.reshape(h.shape[0], -1) @ v["w"]

    variables = {"table": normal(rng_of(0), 11, 4), "w": normal(rng_of(1), 12, 5)}
    tokens = rng_of(2).integers(0, 11, (8, 3))
    assert tokens.dtype == np.int64
    quantized = quantize(variables, tokens, aq.recipes.nearest(8, 8, batch_size=8), (apply, None))
    expected = apply(variables, tokens)
    assert np.abs(quantized(tokens) - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("pattern", ["block_7", "conv$"])
def test_an_override_that_matches_nothing_is_an_error(pattern):
    recipe = NEAREST.replace(overrides=({"pattern": pattern, "weight_bits": 3},))
    with pytest.raises(InputError, match=r"overrides: '.*' matches none of .*stem/kernel"):
        quantize(recipe=recipe)


def test_a_pattern_alone_is_no_override():
    with pytest.raises(InputError, match=r"^overrides: 'stem' must be an aq\.Override\(pattern, "):
        NEAREST.replace(overrides=["stem"])


def test_an_override_that_is_no_regex_is_an_error():
    recipe = NEAREST.replace(overrides=({"pattern": "block_(", "weight_bits": 3},))
    with pytest.raises(InputError, match=r"overrides: 'block_\('"):
        quantize(recipe=recipe)


def test_a_model_without_weighted_op():
    with pytest.raises(InputError, match="no weighted op"):
        quantize({"a": np.ones((1, 1), np.float32)}, normal(rng_of(0), 8, 3),
                 net=(lambda v, x: x * v["a"], None))  # fmt: skip


def test_weights_that_are_closed_over():
    apply, variables = mlp()
    net = (lambda v, x: apply(variables, x) + v["zero"], {"zero": np.zeros((1, 1), np.float32)})
    with pytest.raises(InputError, match="no conv or dot takes a weight from `variables`"):
        quantize(calibration=normal(rng_of(0), 8, 6), net=net)


def test_an_output_without_sample_axis_is_an_error():
    apply, variables = residual_net()
    net = (lambda v, x: jnp.mean(apply(v, x)), variables)
    with pytest.raises(InputError, match="sample"):
        quantize(net=net)


def test_an_output_of_class_numbers_is_an_error():
    apply, variables = residual_net()
    with pytest.raises(InputError, match=r"only int32; .* return the logits, not their argmax"):
        quantize(
            recipe=aq.recipes.qdrop(batch_size=8, steps=1),
            net=(lambda v, x: jnp.argmax(apply(v, x), axis=-1).astype(jnp.int32), variables),
        )


def test_nothing_is_written_into_the_callers_arrays():
    _, variables = residual_net()
    x, kept = images(0, 8), jax.tree.map(np.copy, residual_net()[1])
    before = x.copy()
    quantize(variables, x, aq.recipes.nearest(2, 2, batch_size=8))
    np.testing.assert_array_equal(x, before)
    jax.tree.map(np.testing.assert_array_equal, variables, kept)
