import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import aquant_jax as aq
from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.adaround import soft_codes
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.graph.subgraph import BlockInputs, constant_inputs
from aquant_jax.layers.fake_quant import Weights, per_channel
from aquant_jax.plan.block_program import forward, make_block_program, random_keep
from aquant_jax.reconstruction.weights import alpha_of, init_borders, make_weight_quantizers
from tests.support import numpy_reference as reference
from tests.support.nets import conv, images, normal, residual_net, rng_of

BITS = 3


@functools.cache
def block(granularity="mean", preset="aquant"):
    """The residual block of a small network as a program, with its float weights."""
    apply, variables = residual_net(seed=3)
    recipe = getattr(aq.recipes, preset)(4, BITS, batch_size=4)
    if preset == "aquant":
        recipe = recipe.replace(border_granularity=granularity, border="quadratic", phi="clamp")
    net = aq.prepare(apply, variables, images(0, 8, size=5), recipe)
    program = make_block_program(net.graph, net.plan, net.blocks[1].start, net.blocks[1].targets)
    quantizers = make_weight_quantizers(program, net.folded, {})
    assert constant_inputs(net.graph, program.subgraph, variables) == []
    return program, quantizers


def borders_of(program, seed=5):
    rng = rng_of(seed)
    return [
        {name: np.asarray(c) + np.float32(0.05) * normal(rng, *c.shape) for name, c in own.items()}
        for own in init_borders(program)
    ]


GRIDS = ((np.float32(0.21), 0.0), (np.float32(0.33), 0.0))
TENSORS = [ActivationQuantizer(jnp.float32(s), jnp.float32(z)) for s, z in GRIDS]


def soft(program, quantizers, alphas):
    """Real values of softly rounded weights."""
    found = []
    for op, grid, alpha in zip(program.subgraph.weighted, quantizers, alphas, strict=True):
        scale, zero = per_channel(op, grid.scale), per_channel(op, grid.zero_point)
        found.append(scale * (soft_codes(grid.weight / scale, alpha, zero, 4) - zero))
    return found


@pytest.fixture(params=borders.GRANULARITIES)
def case(request):
    program, quantizers = block(request.param)
    ops = program.subgraph.weighted
    alphas = [alpha_of(op, g) for op, g in zip(ops, quantizers, strict=True)]
    x = np.maximum(normal(rng_of(6), 4, 5, 5, 4), 0)
    return (
        request.param,
        program,
        quantizers,
        [np.asarray(a) for a in alphas],
        borders_of(program),
        x,
    )


def run(program, quantizers, weights, tensors, coefficients, x, keep=None):
    own = [Weights(w, g.bias, c) for w, g, c in zip(weights, quantizers, coefficients, strict=True)]
    (y,) = forward(program, own, tensors, BlockInputs([x]), keep)
    return y


def numpy_weights(quantizers, alphas):
    return [
        reference.soft_weight(
            np.float64(g.weight), np.float64(g.scale), np.float64(g.zero_point), 4, np.float64(a)
        )
        for g, a in zip(quantizers, alphas, strict=True)
    ]


def test_a_residual_block_is_that_of_the_numpy_reference(case):
    granularity, program, quantizers, alphas, coefficients, x = case
    found = run(program, quantizers, soft(program, quantizers, alphas), TENSORS, coefficients, x)
    single = [np.float32(w) for w in numpy_weights(quantizers, alphas)]
    biases = [np.asarray(g.bias) for g in quantizers]
    boundary_inputs = [reference.Live] * 3
    expected = reference.residual_block(
        x, single, biases, GRIDS, BITS, coefficients, granularity, boundary_inputs
    )
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    # The skip sees the tensor rounded to nearest, and not the float one.
    floating = run(program, quantizers, soft(program, quantizers, alphas), None, coefficients, x)
    assert np.abs(found - floating).max() > 0.05


def test_gradients_of_a_residual_block_are_those_of_the_frozen_surrogate(case):
    """Step sizes, border coefficients and alpha, by finite differences in numpy."""
    granularity, program, quantizers, alphas, coefficients, x = case
    dy = normal(rng_of(7), 4, 5, 5, 4)
    biases = [np.float64(g.bias) for g in quantizers]
    frozen = [reference.Frozen() for _ in range(3)]

    def surrogate(steps, coefficients, alphas):
        pairs = [(s, z) for s, (_, z) in zip(steps, GRIDS, strict=True)]
        y = reference.residual_block(
            np.float64(x), numpy_weights(quantizers, alphas), biases, pairs, BITS, coefficients,
            granularity, frozen,
        )  # fmt: skip
        return np.sum(dy * y)

    def loss(steps, coefficients, alphas):
        tensors = [t._replace(step_size=s) for t, s in zip(TENSORS, steps, strict=True)]
        return jnp.sum(
            dy
            * run(program, quantizers, soft(program, quantizers, alphas), tensors, coefficients, x)
        )

    steps = [t.step_size for t in TENSORS]
    dsteps, dborders, dalphas = jax.jit(
        jax.grad(loss, argnums=(0, 1, 2)),
        compiler_options={"xla_backend_optimization_level": 0},
    )(steps, coefficients, alphas)

    point = [np.float64(np.float32(s)) for s in steps]
    exact = jax.tree.map(np.float64, coefficients)
    exact_alphas = [np.float64(a) for a in alphas]
    surrogate(point, exact, exact_alphas)  # freezes
    for i in range(2):
        numeric = reference.numerical_gradient(
            lambda s, i=i: surrogate([*point[:i], s, *point[i + 1 :]], exact, exact_alphas),
            point[i],
        )
        np.testing.assert_allclose(dsteps[i], numeric, rtol=2e-3)
        for name in exact[i]:
            numeric = some_differences(
                lambda c, i=i, name=name: surrogate(
                    point,
                    [{**e, name: c} if j == i else e for j, e in enumerate(exact)],
                    exact_alphas,
                ),
                exact[i][name],
            )
            agree(dborders[i][name], numeric)
        numeric = some_differences(
            lambda a, i=i: surrogate(
                point, exact, [a if j == i else b for j, b in enumerate(exact_alphas)]
            ),
            exact_alphas[i],
        )
        agree(dalphas[i], numeric)


def some_differences(function, value, count=6, epsilon=1e-6):
    """Central differences at a few places spread over `value`: place -> derivative."""
    found = {}
    for flat in np.linspace(0, value.size - 1, count).astype(int):
        index_of = np.unravel_index(flat, value.shape)
        high, low = value.copy(), value.copy()
        high[index_of] += epsilon
        low[index_of] -= epsilon
        found[index_of] = (function(high) - function(low)) / (2 * epsilon)
    return found


def agree(gradient, numeric):
    top = max(map(abs, numeric.values()))
    assert top > 0
    for index_of, value in numeric.items():
        assert abs(gradient[index_of] - value) < 2e-3 * top


def test_border_of_one_half_is_the_qdrop_block():
    """The same state through both presets: identical codes, so equal outputs."""
    x = np.maximum(normal(rng_of(6), 4, 5, 5, 4), 0)
    outputs = []
    for preset in ("qdrop", "aquant"):
        program, quantizers = block(preset=preset)
        weights = [g.weight for g in quantizers]
        outputs.append(run(program, quantizers, weights, TENSORS, init_borders(program), x))
    np.testing.assert_allclose(*outputs, atol=1e-5)


class TestDrop:
    def test_a_mask_is_shared_by_the_consumers_of_a_tensor(self):
        program, quantizers = block(preset="qdrop")
        seen = []

        def keep(value_id, shape):
            seen.append(value_id)
            return jnp.zeros(shape, bool)

        x = np.maximum(normal(rng_of(6), 4, 5, 5, 4), 0)
        weights = [g.weight for g in quantizers]
        dropped = run(program, quantizers, weights, TENSORS, [{}, {}], x, keep)
        assert len(seen) == len(set(seen)) == 2
        floating = run(program, quantizers, weights, None, [{}, {}], x)
        np.testing.assert_allclose(dropped, floating, atol=1e-5)

    @pytest.mark.parametrize("preset", ["qdrop", "aquant"])
    def test_keeping_everything_is_keeping_no_mask(self, preset):
        program, quantizers = block(preset=preset)
        x = np.maximum(normal(rng_of(6), 4, 5, 5, 4), 0)
        weights = [g.weight for g in quantizers]
        ones = lambda value, shape: jnp.ones(shape, bool)  # noqa: E731
        own = borders_of(program)
        kept = run(program, quantizers, weights, TENSORS, own, x, ones)
        np.testing.assert_array_equal(kept, run(program, quantizers, weights, TENSORS, own, x))

    def test_views_of_a_tensor_see_the_same_mask(self):
        """A transposed and a plain reader of one tensor drop the same elements."""

        def apply(v, x):
            h = jax.nn.relu(x @ v["stem"])
            return (h @ v["a"]) + (h.T.T @ v["b"])

        variables = {n: normal(rng_of(i), 4, 4) for i, n in enumerate(("stem", "a", "b"))}
        x = normal(rng_of(3), 8, 4)
        net = aq.prepare(apply, variables, x, aq.recipes.qdrop(8, 2, batch_size=8, last_act_bits=2))
        program = make_block_program(
            net.graph, net.plan, net.blocks[1].start, net.blocks[1].targets
        )
        assert len(program.tensors) == 1
        own = [Weights(*map(jnp.asarray, net.folded[s.path]), {}) for s in program.specs]
        h = np.maximum(x @ variables["stem"], 0)
        mask = rng_of(4).random((8, 4)) < 0.5
        state = ActivationQuantizer(jnp.float32(0.7), jnp.float32(0))
        keep = lambda value, shape: jnp.asarray(mask)  # noqa: E731
        (y,) = forward(program, own, [state], BlockInputs([h]), keep)
        noised = np.where(mask, reference.quantize_activation(h, np.float32(0.7), 0, 2), h)
        np.testing.assert_allclose(y, noised @ (variables["a"] + variables["b"]), atol=1e-4)

    @pytest.mark.parametrize("probability", [0.5, 0.25, 0.9])
    def test_random_masks_have_their_probability(self, probability):
        key = jax.random.key(0)
        mask = random_keep(key, probability, (50, 41, 7))
        assert mask.shape == (50, 41, 7)
        assert mask.dtype == bool
        assert float(jnp.mean(mask.astype(jnp.float32))) == pytest.approx(probability, abs=0.02)
        other = random_keep(jax.random.key(1), probability, (50, 41, 7))
        assert float(jnp.mean((mask != other).astype(jnp.float32))) > 0.1
        # Every sample has a mask of its own: no place is always kept or dropped.
        along = jnp.mean(mask.astype(jnp.float32), axis=0)
        assert float(jnp.abs(along - probability).max()) < 0.35


def specs_of(recipe, net=None, x=None):
    apply, variables = net or residual_net(blocks=2)
    x = images(0, 8) if x is None else x
    return aq.prepare(apply, variables, x, recipe.replace(batch_size=8)).plan.layers


class TestBits:
    def test_first_and_last_layers_have_eight_bits(self):
        specs = specs_of(aq.recipes.qdrop(2, 3))
        bits = {p: (s.weight_bits, s.act_bits if s.tensor else None) for p, s in specs.items()}
        assert bits.pop("stem/kernel") == (8, None)  # its input is left float
        assert bits.pop("head/kernel") == (8, 8)
        assert set(bits.values()) == {(2, 3)}

    def test_none_gives_the_layers_the_recipes_bits(self):
        recipe = aq.recipes.qdrop(2, 3, first_weight_bits=None, last_weight_bits=None,
                                  last_act_bits=None)  # fmt: skip
        specs = specs_of(recipe)
        assert {s.weight_bits for s in specs.values()} == {2}
        assert specs["head/kernel"].act_bits == 3

    def test_quantize_input(self):
        specs = specs_of(aq.recipes.qdrop(2, 3, quantize_input=True))
        assert specs["stem/kernel"].tensor == "stem/kernel"
        assert specs_of(aq.recipes.qdrop(2, 3))["stem/kernel"].tensor is None

    def test_first_output_bits(self):
        specs = specs_of(aq.recipes.qdrop(2, 3, first_output_bits=8))
        assert specs["block_1/conv1/kernel"].act_bits == 8  # reads the stem's output
        assert specs["block_1/conv2/kernel"].act_bits == 3

    def test_overrides_by_regex_the_last_match_wins(self):
        overrides = (
            {"pattern": "block_", "weight_bits": 5, "act_bits": 6},
            {"pattern": "block_2/conv1", "weight_bits": 7},
            {"pattern": "head", "keep_float": True},
        )
        specs = specs_of(aq.recipes.qdrop(2, 3, overrides=overrides))
        assert specs["block_1/conv2/kernel"].weight_bits == 5
        assert specs["block_1/conv2/kernel"].act_bits == 6
        last = specs["block_2/conv1/kernel"]
        assert (last.weight_bits, last.act_bits) == (7, 6)
        assert specs["head/kernel"].weight_bits is None
        assert specs["head/kernel"].tensor is None

    def test_readers_of_one_tensor_share_its_state_and_bits(self):
        def apply(v, x):
            h = jax.nn.relu(conv(x, v["stem"]))
            pooled = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "SAME")
            y = conv(h, v["left"]) + conv(pooled, v["right"])
            return jnp.mean(y, (1, 2)) @ v["head"]

        variables = {n: normal(rng_of(i), 3, 3, c, 4) for i, (n, c) in
                     enumerate((("stem", 3), ("left", 4), ("right", 4)))}  # fmt: skip
        variables["head"] = normal(rng_of(9), 4, 2)
        recipe = aq.recipes.qdrop(2, 3, overrides=({"pattern": "right", "act_bits": 5},))
        specs = specs_of(recipe, (apply, variables))
        assert specs["left"].tensor == specs["right"].tensor == "left"
        assert specs["left"].act_bits == specs["right"].act_bits == 5

    def test_an_override_of_bits_undoes_an_earlier_keep_float(self):
        overrides = (
            {"pattern": ".", "keep_float": True},
            {"pattern": "block_1/conv2", "weight_bits": 4, "act_bits": 5},
        )
        specs = specs_of(aq.recipes.qdrop(2, 3, overrides=overrides))
        assert specs["block_1/conv1/kernel"].weight_bits is None
        conv2 = specs["block_1/conv2/kernel"]
        assert (conv2.weight_bits, conv2.act_bits) == (4, 5)

    def test_of_the_readers_of_a_tensor_the_last_override_decides(self):
        def apply(v, x):
            h = jax.nn.relu(x @ v["a"])
            return h @ v["left"] + h @ v["right"]

        variables = {n: normal(rng_of(i), 3, 3) for i, n in enumerate(("a", "left", "right"))}
        for order in (("left", "right"), ("right", "left")):
            overrides = tuple(
                {"pattern": pattern, "act_bits": 4 + i} for i, pattern in enumerate(order)
            )
            recipe = aq.recipes.qdrop(2, 3, overrides=overrides)
            specs = specs_of(recipe, (apply, variables), normal(rng_of(5), 8, 3))
            assert specs["left"].act_bits == specs["right"].act_bits == 5

    def test_bits_of_an_input_that_stays_float_are_an_error(self):
        recipe = aq.recipes.qdrop(2, 3, overrides=({"pattern": "stem", "act_bits": 8},))
        with pytest.raises(aq.InputError, match=r"'stem' sets act_bits to 8, but the input of"):
            specs_of(recipe)

    def test_an_input_scaled_by_variables_is_still_the_input(self):
        def apply(v, x):
            h = jax.nn.relu(conv((x - v["mean"]) / v["std"], v["first"]))
            return conv(h, v["second"])

        variables = {
            "mean": normal(rng_of(0), 1, 1, 1, 3), "std": np.float32(2),
            "first": normal(rng_of(1), 3, 3, 3, 4), "second": normal(rng_of(2), 3, 3, 4, 4),
        }  # fmt: skip
        specs = specs_of(aq.recipes.qdrop(2, 3), (apply, variables))
        assert (specs["first"].weight_bits, specs["first"].tensor) == (8, None)
        assert specs["second"].tensor == "second"

    def test_what_is_looked_up_in_a_table_is_not_the_input(self):
        def apply(v, tokens):
            h = v["table"][tokens] + v["position"]
            return jax.nn.relu(h @ v["a"]) @ v["b"]

        shapes = {"table": (9, 4), "position": (1, 5, 4), "a": (4, 4), "b": (4, 2)}
        variables = {name: normal(rng_of(3), *shape) for name, shape in shapes.items()}
        tokens = rng_of(7).integers(0, 9, (8, 5)).astype(np.int32)
        specs = specs_of(aq.recipes.qdrop(2, 3), (apply, variables), tokens)
        assert specs["a"].weight_bits == 2
        assert specs["a"].tensor == "a"

    def test_a_layer_without_quantized_input_has_no_border(self):
        specs = specs_of(aq.recipes.aquant(2, 2))
        assert specs["stem/kernel"].border is None
        assert specs["head/kernel"].border is not None
