"""The whole-network stage: its gradient, what it learns and deploys, resuming, and wrong input."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax.errors import InputError, ReconstructionError
from aquant_jax.graph.subgraph import bind_inputs
from aquant_jax.plan.block_program import forward, make_block_program
from aquant_jax.plan.prepare import prepare
from aquant_jax.reconstruction import finetune_checks
from aquant_jax.reconstruction.chain import Chain, Parts
from aquant_jax.reconstruction.finetune import float_parts
from aquant_jax.reconstruction.loss import network_loss
from aquant_jax.storage import archive
from tests.support.nets import assert_same_network, images, mlp, normal, rng_of, small_net
from tests.support.observers import Recorder

X = images(0, 24, size=5)
COMPILER = aq.Compiler()
BLOCKS = aq.recipes.aquant(2, 2, steps=3, batch_size=4)
FIELDS = {
    "finetune_steps": 6, "finetune_lr": 3e-3, "finetune_eval_every": 2, "finetune_held_out": 0.3,
}  # fmt: skip
RECIPE = BLOCKS.replace(**FIELDS)


class StopHereError(Exception):
    pass


def quantize(recipe=RECIPE, x=X, net=None, observer=None, **more):
    apply, variables = net or small_net()
    observer = observer or aq.Observer()
    return aq.quantize(apply, variables, x, recipe, observer=observer, compiler=COMPILER, **more)


def jitter(key, batch):
    return batch + np.float32(0.05) * jax.random.normal(key, batch.shape)


@functools.cache
def finetuned():
    return quantize()


class StopAtStage(aq.Observer):
    def on_block_start(self, index, block):
        if block.name == "whole network":
            raise StopHereError


@functools.cache
def before():
    """The network as the stage finds it: its blocks alone."""
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(StopHereError):
            quantize(resume=folder, observer=StopAtStage())
        return quantize(BLOCKS, resume=folder, restart_from=3)


def held_out():
    """The numbers of the samples of `X` that nothing learns from."""
    seed = int(np.random.SeedSequence([0, 3]).generate_state(1)[0])
    return np.sort(np.random.default_rng(seed).permutation(len(X))[:8])


def squared(output, target):
    """The relative squared error, in numpy."""
    output, target = np.asarray(output, np.float64), np.asarray(target, np.float64)
    return np.mean((output - target) ** 2) / np.mean(target**2)


class TestChain:
    """The gradient, block by block, is that of the whole network."""

    def two_outputs(self):
        """One output is made in the first block, and integers cross a boundary."""
        apply, variables = small_net()

        def wide(variables, x):
            early = jax.nn.relu(x @ variables["first"])
            logits = apply(variables["net"], early)
            return {"logits": logits, "early": early, "class": jnp.argmax(logits, -1)}

        return wide, {"net": variables, "first": normal(rng_of(3), 3, 3)}

    def test_gradient_and_outputs_of_the_whole(self):
        apply, variables = self.two_outputs()
        quantized = quantize(BLOCKS.replace(steps=0), net=(apply, variables))
        net = prepare(apply, variables, X, BLOCKS)
        chain = Chain(net, COMPILER)
        assert len(chain.programs) > 2
        leaves = {net.graph.inputs[0]: jnp.asarray(X[: net.batch])}
        ends = net.blocks[-1].end
        whole = make_block_program(net.graph, net.plan, (), ends)
        inputs = bind_inputs(net.graph, whole.subgraph, net.variables, leaves)
        weights = {
            spec.path: float_parts(net)
            .weights[spec.path]
            ._replace(border=quantized.layers[spec.path].border)
            for spec in whole.specs
        }
        parts = Parts(weights, quantized.activations)
        floats = [
            i for i, v in enumerate(ends) if jnp.issubdtype(net.graph.avals[v].dtype, np.inexact)
        ]

        def cotangent(output):
            return jnp.cos(jnp.arange(output.size)).reshape(output.shape)

        def outputs_of(parts):
            own = [parts.weights[spec.path] for spec in whole.specs]
            activations = [parts.activations[tensor.key] for tensor in whole.tensors]
            return forward(whole, own, activations, inputs)

        def total(parts):
            outputs = outputs_of(parts)
            pairs = ((outputs[i], cotangent(outputs[i])) for i in floats)
            return sum(jnp.sum(output * c) for output, c in pairs), outputs

        expected, wanted = jax.jit(jax.grad(total, has_aux=True))(parts)
        boundaries = chain.forward(parts, leaves)
        for one, two in zip(boundaries[-1], wanted, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
        cotangents = [cotangent(wanted[i]) for i in floats]
        found = chain.backward(parts, leaves, boundaries, cotangents)
        assert found.weights.keys() == expected.weights.keys()
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-3), found, expected
        )


class TestWhatIsLearned:
    def test_the_report_is_the_loss_of_what_is_deployed(self):
        report = finetuned().reports[-1]
        apply, variables = small_net()
        for q, error in ((before(), report.start_error), (finetuned(), report.final_error)):
            batches = [X[rows] for rows in np.split(held_out(), 2)]
            losses = [squared(q(x), apply(variables, x)) for x in batches]
            np.testing.assert_allclose(error, np.mean(losses), rtol=1e-4)
        assert report.final_error < report.start_error
        assert report.best_step in (2, 4, 6)
        assert report.held_out_curve[:, 0].tolist() == [0, 2, 4, 6]
        assert (report.index, report.name, report.steps) == (3, "whole network", 6)
        assert np.isfinite(report.loss_curve).all()
        assert report.warning is None

    def test_blocks_learn_nothing_from_what_is_held_out(self):
        other = X.copy()
        other[held_out()[held_out() >= 4]] *= 3  # the first batch sets the scale of the caches
        recipe = RECIPE.replace(init_samples=4)
        curves = [[r.loss_curve for r in quantize(recipe, x).reports[:3]] for x in (X, other)]
        np.testing.assert_array_equal(*curves)
        with_all = quantize(recipe.replace(finetune_steps=0), other).reports
        assert any((r.loss_curve != c).any() for r, c in zip(with_all, curves[0], strict=True))

    def test_everything_of_a_layer_moves_and_keeps_its_form(self):
        path = "block_1/conv2/kernel"
        old, new = before().layers[path], finetuned().layers[path]
        for name in ("scale", "bias"):
            assert (getattr(old, name) != getattr(new, name)).any()
        for name, coefficients in old.border.items():
            assert (coefficients != new.border[name]).any()
        np.testing.assert_array_equal(old.zero_point, new.zero_point)
        assert new.codes.dtype == jnp.uint8
        shapes = [
            jax.tree.map(lambda a: (a.shape, a.dtype), q.layers) for q in (before(), finetuned())
        ]
        assert shapes[0] == shapes[1]
        steps = [q.activations[path].step_size for q in (before(), finetuned())]
        assert steps[0] != steps[1]

    @pytest.mark.parametrize("weights", [True, False])
    def test_codes_move_only_if_asked(self, weights):
        x, fields = (
            normal(rng_of(0), 32, 6),
            {"batch_size": 8, "finetune_weight_lr": 0.05 * weights},
        )
        start = aq.recipes.nearest(2, 2)
        recipe = start.replace(**FIELDS | fields | {"finetune_lr": 0.05, "finetune_steps": 40})
        old, new = (quantize(r, x, mlp()) for r in (start, recipe))
        moved = [(old.layers[path].codes != own.codes).any() for path, own in new.layers.items()]
        assert new.reports[-1].best_step
        assert any(moved) == weights
        for summary in new.summary():
            assert summary.codes.max() < 2**summary.weight_bits

    def test_the_start_is_kept_bit_for_bit_if_nothing_is_better(self):
        q = quantize(RECIPE.replace(finetune_lr=1.0))
        assert_same_network(q, before())
        report = q.reports[-1]
        assert report.best_step == 0
        assert report.final_error == report.start_error
        assert "keeping the start" in report.warning

    def test_augmentation_changes_what_is_learned(self):
        one, two, other = (
            quantize(augment=a) for a in (jitter, jitter, lambda key, x: jitter(key, -x))
        )
        assert_same_network(one, two)
        for q in (other, finetuned()):
            assert one.layers["head/kernel"].bias.tolist() != q.layers["head/kernel"].bias.tolist()

    # A checkpoint does not know what learned it: tests/deployment/test_checkpoint.py.
    @pytest.mark.slow
    def test_saved_and_restored(self, tmp_path):
        aq.save(finetuned(), tmp_path / "net", X[:2])
        restored = aq.restore(tmp_path / "net")
        np.testing.assert_array_equal(restored(X[:2]), finetuned()(X[:2]))

    def test_any_preset_and_pytree_of_outputs(self):
        apply, variables = mlp()

        def named(variables, x):
            logits = apply(variables, x["x"])
            return {
                "twice": np.float32(2) * logits,
                "logits": logits,
                "class": jnp.argmax(logits, -1),
            }

        x = {"x": normal(rng_of(0), 32, 6)}
        recipe = aq.recipes.nearest(2, 2, **FIELDS | {"finetune_steps": 20}, finetune_loss="kl")
        q = quantize(recipe.replace(batch_size=8), x, (named, variables))
        assert q.reports[-1].final_error < q.reports[-1].start_error
        assert set(q(x)) == {"twice", "logits", "class"}

    def test_a_loss_that_is_not_finite_is_told(self):
        with pytest.raises(ReconstructionError, match=r"whole network: the loss is nan near step"):
            quantize(augment=lambda key, x: x * np.float32(np.nan))


class TestResume:
    def interrupt(self, folder, at, recipe=RECIPE):
        class Stop(aq.Observer):
            def on_step(self, index, step, loss):
                if (index, step) == (3, at):
                    raise StopHereError

        with pytest.raises(StopHereError):
            quantize(recipe, resume=folder, observer=Stop())

    # Step 2 is before the first checkpoint, where all starts again.
    @pytest.mark.parametrize("at", [pytest.param(2, marks=pytest.mark.slow), 6])
    def test_to_the_same_bits(self, tmp_path, at):
        self.interrupt(tmp_path, at)
        observer = Recorder()
        again = quantize(resume=tmp_path, observer=observer)
        assert observer.learned == [3]
        assert_same_network(again, finetuned())
        one, two = again.reports[-1], finetuned().reports[-1]
        np.testing.assert_array_equal(one.loss_curve, two.loss_curve)
        np.testing.assert_array_equal(one.held_out_curve, two.held_out_curve)
        names = {path.name for path in tmp_path.iterdir() if path.is_dir()}
        assert names == {"000", "001", "002", "003"}
        finished = Recorder()
        assert_same_network(quantize(resume=tmp_path, observer=finished), again)
        assert finished.learned == []
        assert finished.reports[-1].best_step == two.best_step

    def test_it_goes_on_where_it_was(self, tmp_path):
        self.interrupt(tmp_path, 6)
        assert (tmp_path / "003-000000004").is_dir()

        class Steps(aq.Observer):
            taken: list[int] = []  # noqa: RUF012

            def on_step(self, index, step, loss):
                self.taken.append(step)

        quantize(resume=tmp_path, observer=Steps())
        assert Steps.taken == [6]

    def test_a_restart_of_the_stage_alone(self, tmp_path):
        self.interrupt(tmp_path, 4)
        recipe = RECIPE.replace(finetune_lr=1e-3)
        with pytest.raises(InputError, match=r"differs in recipe\.reconstruction\.finetune_lr"):
            quantize(recipe, resume=tmp_path)
        observer = Recorder()
        again = quantize(recipe, resume=tmp_path, restart_from=3, observer=observer, augment=jitter)
        assert observer.learned == [3]
        assert_same_network(again, quantize(recipe, augment=jitter))
        with pytest.raises(InputError, match="differs in augment"):
            quantize(recipe, resume=tmp_path)

    def test_a_refused_restart_keeps_the_progress(self, tmp_path):
        self.interrupt(tmp_path, 6)
        (tmp_path / "002" / "notes.txt").write_text("mine")
        before = archive.sizes(tmp_path)
        with pytest.raises(InputError, match=r"notes\.txt is of unknown origin"):
            quantize(resume=tmp_path, restart_from=1)
        assert archive.sizes(tmp_path) == before

    def test_damaged_progress_is_named(self, tmp_path):
        self.interrupt(tmp_path, 6)
        index = tmp_path / "003-000000004" / archive.INDEX
        index.write_text(index.read_text()[:-20])
        with pytest.raises(InputError, match=r"003-000000004"):
            quantize(resume=tmp_path)


class TestWrongInput:
    def probabilities(self):
        apply, variables = small_net()
        return lambda v, x: jax.nn.softmax(apply(v, x)), variables

    def one_class(self):
        apply, variables = small_net()
        return lambda v, x: apply(v, x)[:, :1], variables

    @pytest.mark.parametrize(
        ("net", "message"),
        [
            ("probabilities", r"float32\[4, 5\] is not one of logits; its rows are probabilities"),
            ("one_class", r"float32\[4, 1\] is not one of logits; it needs real outputs with"),
        ],
    )
    def test_kl_of_no_logits(self, net, message):
        observer = Recorder()
        with pytest.raises(InputError, match=message):
            quantize(
                RECIPE.replace(finetune_loss="kl"), net=getattr(self, net)(), observer=observer
            )
        assert observer.learned == []

    @pytest.mark.parametrize(
        ("augment", "message"),
        [
            (
                lambda key, x: x[:, 1:],
                r"calibration float32\[4, 4, 5, 3\] of float32\[4, 5, 5, 3\]",
            ),
            (lambda key, x: x.astype(jnp.float16), r"calibration float16\[4, 5, 5, 3\] of float32"),
            (lambda key, x: [x], "augment returns PyTreeDef"),
            (lambda key, x: x.no_such, r"augment fails on 4 samples: AttributeError"),
            (lambda x: x, r"augment fails on 4 samples: TypeError"),
        ],
    )
    def test_augmentations(self, augment, message):
        observer = Recorder()
        with pytest.raises(InputError, match=message) as raised:
            quantize(augment=augment, observer=observer)
        assert "\n" not in str(raised.value)
        assert observer.learned == []

    def test_an_augmentation_that_nothing_uses(self):
        with pytest.raises(InputError, match="augment is given, but finetune_steps is 0"):
            quantize(BLOCKS, augment=jitter)

    def test_too_much_held_out(self):
        message = "finetune_held_out 0.9 holds out 22 of 24 samples and leaves 2, .* batch_size 4"
        with pytest.raises(InputError, match=message):
            quantize(RECIPE.replace(finetune_held_out=0.9))

    def test_too_little_memory(self, monkeypatch):
        monkeypatch.setattr(finetune_checks, "_bytes_needed", lambda run, chain: 2**50)
        message = r"needs about 1048576\.00 GiB, and \d+\.\d\d [MG]iB are free; lower batch_size"
        with pytest.raises(InputError, match=message):
            quantize()

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"finetune_loss": "l1"}, "finetune_loss is 'l1'; known: mse, kl"),
            ({"finetune_held_out": 0.0}, "finetune_held_out is 0.0"),
            ({"finetune_held_out": 1.0}, "finetune_held_out is 1.0"),
            ({"finetune_steps": -1}, "finetune_steps is -1"),
            ({"finetune_lr": 0.0}, "finetune_lr is 0.0"),
            ({"finetune_weight_lr": -1.0}, "finetune_weight_lr is -1.0"),
            ({"finetune_eval_every": 0}, "finetune_eval_every is 0"),
        ],
    )
    def test_fields(self, fields, message):
        with pytest.raises(InputError, match=message):
            RECIPE.replace(**fields)


class TestNetworkLoss:
    def test_kl_leaves_padding_out(self):
        rng = rng_of(1)
        output, target = normal(rng, 2, 3, 5), normal(rng, 2, 3, 5)
        valid = np.array([[1, 1, 0], [1, 0, 0]], bool)

        def kl(y, t):
            p, q = (np.exp(v) / np.exp(v).sum(-1, keepdims=True) for v in (t, y))
            return (p * np.log(p / q)).sum(-1)

        found = network_loss("kl", [(1,)], [output], [target], valid)
        np.testing.assert_allclose(found, kl(output, target)[valid].mean(), rtol=1e-5)

    def test_kl_over_positions(self):
        """Logits whose classes are the positions, as those of an answer's start."""
        rng = rng_of(2)
        output, target = normal(rng, 2, 4), normal(rng, 2, 4)
        valid = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
        found = network_loss("kl", [(1,)], [output], [target], valid)
        rows = []
        for y, t, v in zip(output, target, valid, strict=True):
            p, q = (np.exp(a[v]) / np.exp(a[v]).sum() for a in (t, y))
            rows.append((p * np.log(p / q)).sum())
        np.testing.assert_allclose(found, np.mean(rows), rtol=1e-5)

    def test_mse_is_relative_and_sums_outputs(self):
        rng = rng_of(3)
        output, target = normal(rng, 4, 3), normal(rng, 4, 3)
        pairs = [output, np.float32(10) * output], [target, np.float32(10) * target]
        found = network_loss("mse", [(), ()], *pairs)
        np.testing.assert_allclose(found, 2 * squared(output, target), rtol=1e-5)

    def test_mse_of_complex_values_and_zeros(self):
        z = np.array([[1 + 1j, 2j]], np.complex64)
        found = network_loss("mse", [()], [z], [np.zeros_like(z)])
        assert np.isfinite(found)
        assert found > 1
