"""`quantize` under JAX's configuration flags, and with arguments that it cannot use.

Each case gives the bits of a plain call, or an `InputError` that names the offender.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import aquant_jax as aq
from aquant_jax.plan.block_program import random_keep
from aquant_jax.plan.checks import cache_bytes
from tests.support.nets import normal, relative_error, rng_of

X = normal(rng_of(0), 16, 5, 2)
# One block, in which both layers learn borders, the convolution one for each tap.
RECIPE = aq.recipes.aquant(
    4, 4, steps=2, batch_size=8, quantize_input=True, blocks=("layer",), quant_drop_prob=0,
    border="constant",
)  # fmt: skip
NEAREST = aq.recipes.nearest(8, 8, batch_size=8)
COMPILER = aq.Compiler()


def network():
    rng = rng_of(1)
    return {
        "layer0": {"kernel": normal(rng, 2, 2, 3), "bias": normal(rng, 1, 1, 3)},
        "layer1": {"kernel": normal(rng, 3, 4)},
        "shift": normal(rng, 1, 4),
    }


def apply(variables, x):
    first, last = variables["layer0"], variables["layer1"]
    numbers = ("NWC", "WIO", "NWC")
    y = lax.conv_general_dilated(x, first["kernel"], (1,), "VALID", dimension_numbers=numbers)
    h = jnp.mean(jax.nn.relu(y + first["bias"]), axis=1)
    return jnp.tanh(h @ last["kernel"]) + variables["shift"]


def quantize(recipe=RECIPE, variables=None, x=X, function=apply, **options):
    options = {"observer": aq.Observer(), "compiler": COMPILER, **options}
    variables = network() if variables is None else variables
    return aq.quantize(function, variables, x, recipe, **options)


@functools.cache
def plain():
    quantized = quantize()
    return quantized, np.asarray(quantized(X))


def check_same(quantized, outputs):
    """The bits of a plain call."""
    states = [(q.layers, q.activations, q.constants) for q in (quantized, plain()[0])]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert {a.dtype.name for a in jax.tree.leaves(states[0])} == {"uint8", "float32"}
    np.testing.assert_array_equal(outputs, plain()[1])


CONTEXTS = {
    "x64": functools.partial(jax.enable_x64, True),
    "debug_nans": functools.partial(jax.debug_nans, True),
    "strict_dtypes": functools.partial(jax.numpy_dtype_promotion, "strict"),
    "strict_ranks": functools.partial(jax.numpy_rank_promotion, "raise"),
    "no_transfers": functools.partial(jax.transfer_guard, "disallow"),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_flag_changes_no_bit(name):
    plain()
    x = jax.device_put(X)
    with CONTEXTS[name]():
        quantized = quantize()
        outputs = jax.device_get(quantized(x))
    check_same(quantized, outputs)


def test_prepare_and_sensitivity_move_arrays():
    with jax.transfer_guard("disallow"):
        assert list(aq.prepare(apply, network(), X, NEAREST).folded) == [
            "layer0/kernel", "layer1/kernel",
        ]  # fmt: skip
        assert len(aq.sensitivity(apply, network(), X, NEAREST)) == 2


def test_networks_are_saved_and_restored_under_x64(tmp_path):
    quantized, expected = plain()
    with jax.enable_x64(True):
        aq.save(quantized, tmp_path / "inside")
    aq.save(quantized, tmp_path / "outside")
    np.testing.assert_array_equal(aq.restore(tmp_path / "inside")(X), expected)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(aq.restore(tmp_path / "outside")(X), expected)


def test_saving_and_restoring_move_arrays(tmp_path):
    quantized, expected = plain()
    with jax.transfer_guard("disallow"):
        aq.save(quantized, tmp_path / "saved")
        restored = aq.restore(tmp_path / "saved")
    np.testing.assert_array_equal(restored(X), expected)


def test_x64_draws_the_same_masks():
    def draw():
        return np.asarray(random_keep(jax.random.key(2**31 + 5), 0.3, (1000,)))

    expected = draw()
    with jax.enable_x64(True):
        np.testing.assert_array_equal(draw(), expected)


@pytest.mark.user_model
def test_x64_with_weights_of_64_bits():
    variables = jax.tree.map(np.float64, {"layer1": normal(rng_of(0), 6, 4)})
    x = normal(rng_of(1), 16, 6)
    with jax.enable_x64(True):
        quantized = quantize(NEAREST, variables, x, lambda v, x: x @ v["layer1"])
        outputs = quantized(x)
        assert outputs.dtype == np.float64
        assert relative_error(outputs, x @ variables["layer1"]) < 0.01


def test_without_jit():
    variables, x = {"square": normal(rng_of(0), 4, 4)}, normal(rng_of(1), 4, 4)
    recipe = aq.recipes.brecq(4, 4, steps=1, batch_size=4, quantize_input=True)
    arguments = (recipe, variables, x, lambda v, x: x @ v["square"])
    compiled = quantize(*arguments)
    with jax.disable_jit():
        quantized = quantize(*arguments)
    np.testing.assert_array_equal(quantized.layers["square"].codes, compiled.layers["square"].codes)
    np.testing.assert_allclose(quantized(x), compiled(x), rtol=1e-5)


def test_debug_nans_finds_the_op_that_makes_them():
    def function(v, x):
        return jnp.log(-1 - jax.nn.relu(x @ v["layer1"]))

    variables, x = {"layer1": normal(rng_of(0), 6, 4)}, normal(rng_of(1), 16, 6)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        quantize(NEAREST, variables, x, function)


def swapped(tree):
    """The same numbers, their bytes in the other order."""
    return jax.tree.map(lambda a: a.astype(a.dtype.newbyteorder("S")), tree)


@pytest.mark.parametrize("what", ["variables", "calibration"])
def test_arrays_of_the_other_byte_order(what):
    arguments = {"variables": {"variables": swapped(network())}, "calibration": {"x": swapped(X)}}
    quantized = quantize(**arguments[what])
    check_same(quantized, quantized(X))


@pytest.mark.parametrize("kind", [np.int64, jnp.int32])
def test_any_whole_number_is_a_seed(kind):
    quantized = quantize(seed=kind(0))
    check_same(quantized, quantized(X))


def test_variables_that_the_caller_overwrites_afterwards():
    variables = network()
    variables["layer1"] = jax.tree.map(jnp.array, variables["layer1"])
    deleted = jnp.array(network()["shift"])
    first = quantize(variables=variables)
    second = quantize(variables=variables | {"shift": deleted})
    variables["shift"][:] = 0
    variables["layer1"]["kernel"].delete()
    deleted.delete()
    check_same(first, first(X))
    check_same(second, second(X))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 0.5}, r"^seed is 0\.5; it must be a whole number of 0 or more$"),
        ({"seed": "1"}, r"^seed is '1'; it must be a whole number"),
        ({"seed": None}, r"^seed is None; it must be a whole number"),
        ({"seed": True}, r"^seed is True; it must be a whole number"),
        ({"recipe": None}, r"^recipe is of type NoneType; it must be a Recipe, such as aq"),
        ({"recipe": {"weight_bits": 2}}, r"^recipe is of type dict; it must be a Recipe"),
        ({"observer": aq.Observer}, r"^observer is of type type; it must be an Observer, such as"),
        ({"compiler": aq.Compiler}, r"^compiler is of type type; it must be an aq.Compiler"),
        ({"restart_from": "1"}, r"^restart_from is '1'; it must be a whole number of 0 or more"),
        ({"resume": 3}, r"^resume is of type int; it must be a path$"),
        ({"x": "photos"}, r"^calibration is 'photos', which is not an array$"),
        ({"x": {"text": np.array(["a"] * 16)}}, r"^calibration/text has dtype <U1, which is no"),
        ({"x": {"key": jax.random.key(0)}}, r"^calibration/key has dtype key<fry>, which is no"),
        ({"variables": {"w": "no"}}, r"^variables/w is 'no', which is not an array$"),
        ({"variables": {"w": jax.ShapeDtypeStruct((2,), np.float32)}}, r"^variables/w has dtype o"),
    ],
)  # fmt: skip
def test_what_is_not_an_argument_is_named(options, words):
    with pytest.raises(aq.InputError, match=words):
        quantize(**options)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda net: net(X.tolist()), r"^no input has a sample axis; inputs are arrays"),
        (lambda net: net.with_backend(aq), r"^backend is of type module; .* gpu_ops\.backend\(\)"),
        (
            inspect.unwrap(aq.describe),
            r"^net is of type Quantized; it must be what aq\.prepare returns",
        ),
        (lambda _: aq.save(X, "never"), r"^network is of type ndarray; it must be what aq\.quant"),
        (lambda net: aq.save(net, None), r"^path is of type NoneType; it must be a path$"),
        (lambda net: aq.report(net, 3), r"^path is of type int; it must be a path$"),
        (lambda _: aq.restore(3), r"^path is of type int; it must be a path$"),
        (lambda _: aq.Allocation.load(3), r"^path is of type int; it must be a path$"),
    ],
)
def test_what_is_no_part_of_the_library_is_named(function, words):
    with pytest.raises(aq.InputError, match=words):
        function(plain()[0])


def test_sensitivity_names_the_recipe_too():
    with pytest.raises(aq.InputError, match=r"^recipe is of type dict"):
        aq.sensitivity(apply, network(), X, {"weight_bits": 4})


def test_deleted_and_donated_arrays_are_named():
    variables = network() | {"shift": jnp.zeros((1, 4))}
    jax.jit(lambda a: a + 1, donate_argnums=0)(variables["shift"])
    with pytest.raises(aq.InputError, match=r"^variables/shift \(float32\[1, 4\]\) was deleted or"):
        quantize(variables=variables)
    x = jnp.array(X)
    x.delete()
    with pytest.raises(aq.InputError, match=r"^calibration \(float32\[16, 5, 2\]\) was deleted or"):
        quantize(x=x)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad])
def test_tracers_are_named(transform):
    def of_shift(shift):
        return quantize(variables=network() | {"shift": shift})(X).sum()

    def of_x(x):
        return quantize(x=x)(X).sum()

    stacked = (lambda a: a[None]) if transform is jax.vmap else (lambda a: a)
    with pytest.raises(aq.InputError, match=r"^variables/shift is a tracer of float32\[1,4\]"):
        transform(of_shift)(stacked(network()["shift"]))
    with pytest.raises(aq.InputError, match=r"^calibration is a tracer of float32\[16,5,2\]"):
        transform(of_x)(stacked(X))


def test_jit_around_quantize_without_tracers():
    with pytest.raises(aq.InputError, match=r"^quantize was called inside jax\.jit; call it"):
        jax.jit(lambda: quantize()(X))()


class TestComplex:
    """Layers on complex values are refused, or exactly float; nothing complex is quantized."""

    X = normal(rng_of(0), 16, 6)

    def variables(self):
        rng = rng_of(3)
        wave = normal(rng, 8, 8) + np.complex64(1j) * normal(rng, 8, 8)
        return {"a": normal(rng, 6, 8), "wave": wave, "b": normal(rng, 8, 4)}

    def quantize(self, function, x=X, keep=None, **fields):
        overrides = () if keep is None else ({"pattern": keep, "keep_float": True},)
        recipe = NEAREST.replace(overrides=overrides, **fields)
        return quantize(recipe, self.variables(), x, function)

    def layers(self, v, x):
        """A complex layer, and a real one that reads the same tensor, between real ones."""
        h = jnp.tanh(x @ v["a"])
        z = h.astype(jnp.complex64) @ v["wave"]
        return jnp.abs(z) @ v["b"] + h @ v["b"]

    def test_complex_weights_are_named(self):
        with pytest.raises(aq.InputError, match=r"^wave multiplies complex64 .*\(keep_float\)$"):
            self.quantize(self.layers)

    def test_complex_inputs_are_named(self):
        x = self.X + np.complex64(1j)
        with pytest.raises(aq.InputError, match=r"^a multiplies complex64 values; only real ones"):
            self.quantize(lambda v, x: jnp.abs(x @ v["a"].astype(x.dtype)), x)

    def test_a_layer_that_stays_float_is_float(self, tmp_path):
        expected = self.layers(self.variables(), self.X)
        everything = self.quantize(self.layers, keep="")
        assert relative_error(everything(self.X), expected) < 1e-6
        aq.save(everything, tmp_path / "saved")
        np.testing.assert_array_equal(aq.restore(tmp_path / "saved")(self.X), everything(self.X))
        assert relative_error(self.quantize(self.layers, keep="wave")(self.X), expected) < 0.02

    def test_a_complex_reader_of_a_quantized_tensor_reads_it_exactly(self):
        def function(v, x):
            h = jnp.tanh(x @ v["a"])
            return jnp.fft.fft(h), h @ v["b"]

        quantized = self.quantize(function, keep="a", act_bits=2, last_act_bits=2)
        exact, rounded = function(self.variables(), self.X)
        assert list(quantized.activations) == ["b"]
        np.testing.assert_allclose(quantized(self.X)[0], exact, rtol=1e-5, atol=1e-5)
        assert relative_error(quantized(self.X)[1], rounded) > 0.05

    @pytest.mark.parametrize("granularity", ["block", "layer"])
    def test_a_transform_between_layers_is_exact(self, granularity):
        """A complex tensor crosses from one block to the next."""

        def function(v, x):
            h = x @ v["a"]
            z = lax.complex(h, jnp.sin(h)).reshape(-1, 2, 4)
            return jnp.abs(jnp.fft.fft(z)).reshape(-1, 8) @ v["b"]

        rules = ("matmul", "sum", "norm", "softmax", "activation")
        quantized = self.quantize(function, activations=rules, granularity=granularity)
        assert list(quantized.activations) == ["b"]
        assert relative_error(quantized(self.X), function(self.variables(), self.X)) < 0.02
        net = aq.prepare(function, self.variables(), self.X, quantized.recipe)
        (boundary,) = net.blocks[1].start
        assert net.graph.avals[boundary].dtype == np.complex64
        assert cache_bytes(net.graph, net.blocks, 16) > 2 * 16 * 8 * 8  # it is an input twice
        assert quantized.reports[1].propagated[:, 3].sum() == 16 * 8 * 2

    def test_the_error_of_complex_outputs_counts(self):
        def function(v, x):
            return jnp.fft.fft(jnp.tanh(x @ v["a"]) @ v["b"])

        reports = self.quantize(function, weight_bits=3, last_weight_bits=3).reports
        real = self.quantize(lambda v, x: jnp.tanh(x @ v["a"]) @ v["b"], weight_bits=3,
                             last_weight_bits=3).reports  # fmt: skip
        # Parseval: the transform of four numbers has four times their squares.
        np.testing.assert_allclose(reports[-1].final_error, 4 * real[-1].final_error, rtol=1e-3)
        found = aq.sensitivity(function, self.variables(), self.X, NEAREST)
        assert all(0 < entry.error < 1e-3 for entry in found)

    def test_imaginary_parts_that_are_not_finite_are_named(self):
        x = self.X + np.complex64(1j)
        x[3, 2] = complex(0, np.nan)
        with pytest.raises(aq.InputError, match="calibration has 1 of 96 values that are NaN or"):
            self.quantize(lambda v, x: jnp.abs(x) @ v["a"], x)
