import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import aquant_jax as aq
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.errors import ReconstructionError
from aquant_jax.layers.compiler import Compiler
from aquant_jax.layers.fake_quant import run_layer
from aquant_jax.plan.block_program import make_block_program
from aquant_jax.reconstruction import optimize as reconstruct
from aquant_jax.reconstruction.activation_cache import store
from aquant_jax.reconstruction.learning_rates import coefficient_rate
from aquant_jax.reconstruction.loss import output_loss, rounding_loss
from aquant_jax.reconstruction.optimize import draw_batches, initial_params
from aquant_jax.reconstruction.training_step import (
    CalibrationData,
    Quantizers,
    Trainer,
    train_steps,
)
from aquant_jax.reconstruction.weights import make_weight_quantizers
from tests.support.nets import images, rng_of, small_net

X = images(0, 16, size=5)
SILENT = aq.Observer()
COMPILER = Compiler()  # shared, since most of the time here is compilation


def quantize(
    preset="qdrop",
    seed=0,
    net=None,
    compiler=COMPILER,
    observer=SILENT,
    calibration=X,
    **fields,
):
    fields = {"weight_bits": 3, "act_bits": 3, "steps": 4, "batch_size": 8, **fields}
    recipe = getattr(aq.recipes, preset)(**fields)
    apply, variables = net or small_net(width=4)
    return aq.quantize(
        apply, variables, calibration, recipe,
        seed=seed, observer=observer, compiler=compiler,
    )  # fmt: skip


def leaves(quantized):
    return jax.tree.leaves((quantized.layers, quantized.activations))


def same(one, two):
    pairs = zip(leaves(one), leaves(two), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def block_problem(preset="qdrop", samples=16, **fields):
    """Everything that one step of the residual block needs, with made-up activations."""
    apply, variables = small_net(width=4)
    recipe = getattr(aq.recipes, preset)(3, 3, **{"steps": 10, "batch_size": 8, **fields})
    net = aq.prepare(apply, variables, X, recipe)
    program = make_block_program(net.graph, net.plan, net.blocks[1].start, net.blocks[1].targets)
    rng = rng_of(1)
    floating = np.maximum(rng.normal(size=(samples, 5, 5, 4)), 0).astype(np.float32)
    noised = floating + rng.normal(size=floating.shape).astype(np.float32) * np.float32(0.1)
    target = np.maximum(rng.normal(size=(samples, 5, 5, 4)), 0).astype(np.float32)
    caches = [store([[value]], samples) for value in (noised, floating, target)]
    data = CalibrationData(*caches, np.arange(samples))
    start = ActivationQuantizer(jnp.float32(0.3), jnp.float32(0.0))
    tensors = len(program.tensors)
    weights = make_weight_quantizers(program, net.folded, {})
    quantizers = Quantizers(weights, (start,) * tensors, (True,) * tensors)
    return program, quantizers, data, recipe


def optimize(program, quantizers, data, recipe, seed=0):
    on_step = lambda step, loss: None  # noqa: E731
    return reconstruct.optimize(program, quantizers, data, recipe, seed, COMPILER, on_step)


class TestStep:
    # A step of aquant has all that those of the others have.
    @pytest.mark.parametrize(
        "preset",
        [*(pytest.param(p, marks=pytest.mark.slow) for p in ("adaround", "qdrop")), "aquant"],
    )
    def test_our_part_of_a_step_promotes_nothing(self, preset):
        program, quantizers, data, recipe = block_problem(preset, steps=1, granularity="block")
        trainer = Trainer(program, recipe.reconstruction, optax.sgd(1e-3), run_layer)
        params = initial_params(program, quantizers, recipe.reconstruction)
        carry = (params, trainer.optimizer.init(params))
        arguments = (jax.random.key(0), np.zeros(1, np.int32), np.arange(8, dtype=np.int32)[None])
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            _, loss = jax.jit(functools.partial(train_steps, trainer))(
                carry, quantizers, data, *arguments
            )
        assert float(loss[0]) > 0

    def test_the_loss_falls(self):
        curve = optimize(*block_problem("brecq", steps=60, weight_lr=2e-2)).curve
        assert curve.shape == (3, 2)
        assert list(curve[:, 0]) == [20, 40, 60]
        assert curve[-1, 1] < curve[0, 1]

    def test_a_tensor_that_is_not_trained_stays(self):
        program, quantizers, data, recipe = block_problem(step_lr=1e-2)
        quantizers = dataclasses.replace(quantizers, trained=(False, True))
        learned = optimize(program, quantizers, data, recipe).activations
        start = quantizers.activations
        assert learned[0].step_size == start[0].step_size
        assert learned[1].step_size != start[1].step_size
        assert [q.zero_point for q in learned] == [q.zero_point for q in start]

    def test_step_sizes_of_activations_between_layers_are_trained(self):
        problem = block_problem(step_lr=1e-2, steps=2, activations=("sum",))
        assert "block_1/conv2/kernel:sum" in {tensor.key for tensor in problem[0].tensors}
        for quantizer, start in zip(
            optimize(*problem).activations, problem[1].activations, strict=True
        ):
            assert quantizer.step_size != start.step_size

    @pytest.mark.parametrize("step_lr", [pytest.param(1.0, marks=pytest.mark.slow), 1e4])
    def test_step_sizes_stay_positive(self, step_lr):
        problem = block_problem(step_lr=step_lr, steps=5)
        learned = optimize(*problem).activations
        for quantizer, start in zip(learned, problem[1].activations, strict=True):
            assert float(quantizer.step_size) >= 0.99 * 1e-2 * float(start.step_size)

    def test_borders_move_after_their_warmup_only(self):
        moved = {}
        for warmup in (0.0, 0.9):
            problem = block_problem("aquant", border_warmup=warmup, steps=8)
            layers = optimize(*problem).layers
            moved[warmup] = [float(jnp.abs(layer.border["b0"] - 0.5).max()) for layer in layers]
        # In units of the range of 3 bits.
        rate = problem[-1].reconstruction.border_lr * 7 / 3
        assert max(moved[0.9]) < 2 * rate  # one step of the eight: int(0.9 * 8) = 7
        assert max(moved[0.0]) > 3 * rate

    def test_learning_rates_of_coefficients(self):
        program, _, _, recipe = block_problem("aquant", border_gain=0.25, border_range=3.0)

        def rates(**fields):
            learning = recipe.replace(**fields).reconstruction
            names = ("b0", "b1", "b2")
            return [coefficient_rate(program.specs[0], learning, name) for name in names]

        np.testing.assert_allclose(rates(), [0.25 * 7 / 3, 0.25, 0.25 * 3 / 7])
        assert rates(border_range=None, border_gain=1.0) == [1.0, 1.0, 1.0]
        # A user's border may not say which powers its coefficients have.
        assert coefficient_rate(program.specs[0], recipe.reconstruction, "other") == 0.25

    def test_seeds_draw_batches_and_masks(self):
        problem = block_problem(steps=6)
        one, again, other = (optimize(*problem, seed=s) for s in (1, 1, 2))
        np.testing.assert_array_equal(one.curve, again.curve)
        assert one.curve[0, 1] != other.curve[0, 1]

    def test_mixing_and_drop_change_the_loss(self):
        losses = {
            (mixing, dropping): optimize(
                *block_problem("brecq", input_mixing=mixing, quant_drop_prob=dropping, steps=1)
            ).curve[0, 1]
            for mixing, dropping in ((0.0, 0.0), (0.0, 0.5), (0.5, 0.0))
        }
        assert len(set(losses.values())) == 3


def test_the_final_steps_neither_mix_nor_drop(monkeypatch):
    """With nothing moving, their losses are those of a run without any noise."""
    monkeypatch.setattr(reconstruct, "LOG_EVERY", 1)
    still = {"steps": 4, "weight_lr": 1e-12, "step_lr": 1e-12}
    noisy = optimize(*block_problem("qdrop", **still, final_full_quant_fraction=0.5)).curve[:, 1]
    plain = optimize(*block_problem("brecq", **still)).curve[:, 1]
    np.testing.assert_allclose(noisy[2:], plain[2:], rtol=1e-5)
    assert (np.abs(noisy[:2] / plain[:2] - 1) > 1e-3).all()


def test_loss_is_summed_over_channels_and_averaged_over_the_rest():
    program, *_ = block_problem()
    target = jnp.zeros((2, 5, 5, 4))
    output = target.at[0, 0, 0, :2].set(3.0)
    loss = output_loss(program, [output], [target])
    assert float(loss) == pytest.approx(2 * 9.0 / (2 * 5 * 5))
    power = output_loss(program, [output], [target], 2.4)
    assert float(power) == pytest.approx(2 * 3.0**2.4 / (2 * 5 * 5), rel=1e-5)
    integers = jnp.zeros((2, 3), jnp.int32)
    assert float(output_loss(program, [integers], [integers + 1])) == 0.0


def test_rounding_loss_starts_after_its_warmup():
    learning = aq.recipes.qdrop(steps=10, rounding_warmup=0.2).reconstruction
    alphas = [jnp.zeros(5), None, jnp.zeros(3)]
    steps = [rounding_loss(learning, alphas, jnp.int32(s)) for s in range(10)]
    np.testing.assert_allclose(steps, [0, 0] + [0.01 * 8] * 8, rtol=1e-6)


def test_batches_hold_no_sample_twice():
    samples = np.arange(3, 11)
    index = draw_batches(np.random.default_rng(0), samples, steps=50, batch_size=6)
    assert index.shape == (50, 6)
    assert all(len(set(row)) == 6 for row in index)
    assert set(index.ravel()) == set(samples)


# Of qdrop, TestStep.test_seeds_draw_batches_and_masks has one block.
@pytest.mark.parametrize("preset", [pytest.param("qdrop", marks=pytest.mark.slow), "aquant"])
def test_same_seed_same_codes_bit_for_bit(preset):
    one, again, other = (quantize(preset, seed=s, weight_lr=0.05, steps=6) for s in (3, 3, 4))
    assert same(one, again)
    assert not same(one, other)
    np.testing.assert_array_equal(one(X), again(X))


def test_a_block_that_got_worse_falls_back_to_nearest(capsys):
    nearest = quantize("nearest", steps=0)
    worse = quantize("qdrop", steps=3, weight_lr=1e3, step_lr=0.5, observer=aq.TerminalObserver())
    assert all(report.fell_back_to_nearest for report in worse.reports)
    assert all(r.final_error == r.start_error for r in worse.reports)
    assert same(worse, nearest)
    assert "block_1: reconstruction did not reduce the error" in capsys.readouterr().out


@functools.cache
def learned():
    return quantize("brecq", act_bits=8, steps=150, weight_lr=3e-2, step_lr=1e-3)


def test_a_kept_block_never_ends_worse_than_it_started():
    assert all(report.final_error <= report.start_error for report in learned().reports)
    assert any(not report.fell_back_to_nearest for report in learned().reports)


def test_a_loss_that_is_not_finite_names_its_block():
    """Activations near 1e25 are finite, their squares are not."""
    large = X * np.float32(1e25)
    with pytest.raises(ReconstructionError, match=r"stem/kernel: the reconstruction loss is inf"):
        quantize(calibration=large)


class CountingCompiler(Compiler):
    """Counts the functions that it builds, by what they are for."""

    def __init__(self):
        super().__init__()
        self.built = collections.Counter()

    def get(self, key, build, **options):
        def counted():
            self.built[key[0]] += 1
            return build()

        return super().get(key, counted, **options)


@functools.cache
def alone():
    """A deeper network, quantized with a compiler that no other network has used."""
    compiler = CountingCompiler()
    return quantize(net=small_net(width=4, blocks=3), compiler=compiler), compiler


def test_blocks_of_one_shape_share_their_compiled_step():
    _, compiler = alone()
    assert compiler.built["step"] == 3  # stem, one for the three blocks, head
    before = dict(compiler.built)
    other = {"seed": 1, "finetune_lr": 1e-3, "init_samples": 32, "border_tolerance": 0.5}
    quantize(net=small_net(width=4, blocks=3), compiler=compiler, **other)  # a step reads none
    assert compiler.built == before


def test_networks_of_other_bits_share_what_runs_in_float():
    compiler, built = CountingCompiler(), []
    for bits in (2, 4):
        quantize("nearest", weight_bits=bits, net=small_net(width=4, blocks=3), compiler=compiler)
        built.append(compiler.built["forward"])
    assert built[1] - built[0] == 1  # of the quantized blocks; the stem has 8 bits in both


def test_shared_steps_do_not_mix_up_the_weights_of_blocks():
    """Quantized alone or with a shared compiler, a network gets the same codes."""
    quantize(net=small_net(seed=5, width=4, blocks=3))
    assert same(alone()[0], quantize(net=small_net(width=4, blocks=3)))


def test_reconstruction_beats_nearest_rounding():
    """What all of this is for: a smaller error at the output of the network, on other samples."""
    fresh = images(5, 64, size=5)
    apply, variables = small_net(width=4)
    exact = apply(variables, fresh)

    def error(quantized):
        return float(jnp.mean((quantized(fresh) - exact) ** 2))

    assert error(learned()) < 0.7 * error(quantize("nearest", act_bits=8, steps=0))
