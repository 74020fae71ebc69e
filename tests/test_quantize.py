import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aquant_jax as aq
import gpu_ops
from aquant_jax.arithmetic import border
from aquant_jax.layers.backend import ReferenceBackend
from tests.support import numpy_reference as reference
from tests.support.layer_codes import input_codes
from tests.support.nets import images, normal, relative_error, rng_of, small_net, two_convolutions
from tests.support.observers import Recorder

X = images(0, 16, size=5)
# Shared, and with the backend of fewer operations, since most of the time here is compilation.
COMPILER = aq.Compiler(gpu_ops.backend())
COMMON = {"steps": 25, "weight_lr": 2e-2, "step_lr": 1e-3, "seed": 7}


def quantize(preset, wbits=3, abits=3, net=None, calibration=X, **options):
    known = {"seed", "observer"}
    fields = {"batch_size": 8, **{k: v for k, v in options.items() if k not in known}}
    if preset != "nearest":
        fields = {"steps": 2, **fields}
    recipe = getattr(aq.recipes, preset)(wbits, abits, **fields)
    keywords = {"observer": aq.Observer(), **{k: v for k, v in options.items() if k in known}}
    apply, variables = net or small_net()
    return aq.quantize(apply, variables, calibration, recipe, compiler=COMPILER, **keywords)


@functools.cache
def at_one_half():
    """A qdrop run, an aquant run whose borders are kept at one half, and what observed the latter.

    A cache and no fixture of the module, which would be set up outside strict promotion.
    """
    still = {"border_lr": 1e-30, "border": "quadratic", "phi": "clamp"}
    defaults = aq.recipes.qdrop().reconstruction
    shared = (
        "input_mixing", "quant_drop_prob", "final_full_quant_fraction", "rounding_weight",
    )  # fmt: skip
    still |= {name: getattr(defaults, name) for name in shared}
    observer = Recorder()
    aquant = quantize("aquant", **COMMON, **still, observer=observer)
    return quantize("qdrop", **COMMON), aquant, observer


@pytest.fixture
def pair():
    return at_one_half()[:2]


class TestAquantIsQdropAtOneHalf:
    """With B = 0.5 and the same state, the aquant preset gives the codes of the qdrop preset."""

    def test_the_border_stayed_at_one_half(self, pair):
        for spec in pair[1].specs:
            own = pair[1].layers[spec.path].border
            assert (own == {}) == (spec.tensor is None)
            if own:
                np.testing.assert_array_equal(own["b0"], 0.5)
                assert max(np.abs(own[name]).max() for name in ("b1", "b2")) < 1e-25

    def test_weight_codes_are_equal_and_were_learned(self, pair):
        qdrop, aquant = ({e.path: e for e in q.summary()} for q in pair)
        nearest = {e.path: e.codes for e in quantize("nearest").summary()}
        for path, entry in qdrop.items():
            np.testing.assert_array_equal(entry.codes, aquant[path].codes)
        assert any((nearest[path] != entry.codes).any() for path, entry in qdrop.items())

    def test_step_sizes_are_equal(self, pair):
        qdrop, aquant = (q.activations for q in pair)
        assert qdrop.keys() == aquant.keys()
        for key, state in qdrop.items():
            np.testing.assert_allclose(state.step_size, aquant[key].step_size, rtol=1e-5)

    def test_input_codes_are_equal(self, pair):
        """The same state through both specs, on inputs full of ties."""
        qdrop, aquant = pair
        apply, variables = small_net()
        net = aq.prepare(apply, variables, X, qdrop.recipe)
        ops = {op.layer.path: op for op in net.graph.ops if op.layer}
        rng = rng_of(0)
        checked = 0
        for one, two in zip(qdrop.specs, aquant.specs, strict=True):
            if one.tensor is None:
                continue
            op, state = ops[one.path], qdrop.activations[one.tensor]
            shape = net.graph.avals[op.x].shape
            x = (rng.integers(-3, 20, shape) / 2).astype(np.float32) * np.asarray(state.step_size)
            nearest = np.asarray(input_codes(op, one, x, state, {}))
            found = np.asarray(input_codes(op, two, x, state, aquant.layers[one.path].border))
            if one.kind == "conv":
                columns = reference.im2col(nearest, (2, 2), padding=((0, 1), (0, 1)))
                found = np.moveaxis(found, 0, 3)
                nearest = columns
                assert int(state.zero_point) == 0
            np.testing.assert_array_equal(found, nearest)
            checked += 1
        assert checked == 3

    def test_outputs_are_equal(self, pair):
        fresh = images(9, 32, size=5)
        assert relative_error(pair[1](fresh), pair[0](fresh)) < 1e-3


# QDrop: test_sample_counts_that_are_no_multiple_of_the_batch. BRECQ learns a part of AQuant's.
@pytest.mark.parametrize("preset", [pytest.param("brecq", marks=pytest.mark.slow), "aquant"])
def test_eight_bits_are_close_to_float(preset):
    apply, variables = small_net()
    quantized = quantize(preset, 8, 8)
    assert relative_error(quantized(X), apply(variables, X)) < 0.02


def test_a_terminal_shows_the_blocks_and_the_memory(capsys):
    quantize("qdrop", observer=aq.TerminalObserver())
    out, err = capsys.readouterr()
    assert "3 blocks:" in out
    assert "block_1: block_1/conv1/kernel, block_1/conv2/kernel" in out
    assert "cached activations: 0.0 MiB at the peak" in out
    assert "block 3/3 head" in err
    quantize("qdrop", observer=aq.Observer())
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_the_log_has_a_line_a_block(caplog, capsys):
    caplog.set_level("INFO", "absl")
    quantize("qdrop", observer=None)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("3 blocks:")
    assert "cached activations: 0.0 MiB at the peak" in lines[0]
    plan = lines[1].splitlines()
    assert plan[0].startswith("memory in MiB; free are ")
    assert [line.split(":")[0].split()[1] for line in plan[1:]] == ["stem", "block_1", "head"]
    names = ("1/3 stem", "2/3 block_1", "3/3 head")
    for line, name in zip(lines[2:], names, strict=True):
        assert line.startswith(f"block {name}: learned in ")
    assert capsys.readouterr().out == ""


def test_several_observers_see_the_same():
    one, two = Recorder(), Recorder()
    quantize("qdrop", observer=aq.Observers(one, two))
    assert one.learned == two.learned == [0, 1, 2]
    assert one.reports == two.reports


def test_an_observer_sees_steps_and_the_end_of_a_run_that_fails():
    class Failing(aq.Observer):
        def __init__(self):
            self.steps, self.ended = [], 0

        def on_step(self, index, step, loss):
            self.steps.append((index, step))

        def on_block_end(self, report):
            if report.index == 1:
                raise RuntimeError("stop")

        def on_end(self):
            self.ended += 1

    observer = Failing()
    with pytest.raises(RuntimeError, match="stop"):
        quantize("qdrop", **COMMON, observer=observer)
    assert observer.steps == [(0, 20), (0, 25), (1, 20), (1, 25)]
    assert observer.ended == 1


def test_reports_of_the_blocks():
    _, quantized, observer = at_one_half()
    seen = observer.reports
    assert list(quantized.reports) == seen
    assert [r.name for r in seen] == ["stem", "block_1", "head"]
    assert [r.index for r in seen] == [0, 1, 2]
    assert seen[1].layers == ("block_1/conv1/kernel", "block_1/conv2/kernel")
    for report in seen:
        np.testing.assert_array_equal(report.loss_curve[:, 0], [20, 25])
        assert (report.loss_curve[:, 1] >= 0).all()
        assert report.start_error >= report.final_error >= 0
        assert report.seconds > 0
    assert seen[0].propagated.shape == (0, 4)
    assert seen[1].propagated.shape == (16, 4)
    assert seen[1].propagated[:, 3].sum() == 16 * 5 * 5 * 4


def test_nearest_takes_no_steps():
    for report in quantize("nearest").reports:
        assert report.steps == 0
        assert report.start_error == report.final_error
        assert not report.fell_back_to_nearest


def test_first_and_last_layers_and_the_input():
    entries = quantize("nearest", 2, 3).summary()
    assert [e.weight_bits for e in entries] == [8, 2, 2, 8]
    assert [e.act_bits for e in entries] == [None, 3, 3, 8]
    entries = quantize("nearest", 2, 3, first_output_bits=8, quantize_input=True).summary()
    assert [e.act_bits for e in entries] == [3, 8, 3, 8]


def test_keep_float_leaves_a_layer_alone():
    overrides = ({"pattern": "block_1", "keep_float": True}, {"pattern": "head", "weight_bits": 4})
    apply, variables = small_net()
    quantized = quantize("qdrop", overrides=overrides)
    entries = {e.path: e for e in quantized.summary()}
    kept = entries["block_1/conv1/kernel"]
    assert (kept.weight_bits, kept.act_bits, kept.weight_scale) == (None, None, None)
    net = aq.prepare(apply, variables, X, quantized.recipe)
    np.testing.assert_array_equal(kept.codes, net.folded[kept.path].weight)
    assert entries["head/kernel"].weight_bits == 4
    everything = quantize("qdrop", overrides=({"pattern": "", "keep_float": True},))
    assert relative_error(everything(X), apply(variables, X)) < 1e-5


def test_activations_are_quantized_where_they_are_consumed():
    """At 2 bits an activation of the deployed network has at most four values."""

    def apply(v, x):
        h = jax.nn.relu(x @ v["a"])
        return h @ v["b"]

    variables = {"a": normal(rng_of(0), 3, 1), "b": np.ones((1, 1), np.float32)}
    x = normal(rng_of(1), 200, 3)
    quantized = quantize("nearest", 8, 2, net=(apply, variables), calibration=x, last_act_bits=2)
    values = np.unique(np.round(np.asarray(quantized(x)), 5))
    assert len(values) <= 4
    assert len(np.unique(apply(variables, x))) > 50


def test_sample_counts_that_are_no_multiple_of_the_batch():
    quantized = quantize("qdrop", 8, 8, calibration=images(0, 13, size=5))
    apply, variables = small_net()
    assert relative_error(quantized(X), apply(variables, X)) < 0.02


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_half_precision_networks(dtype):
    apply, variables = two_convolutions()
    half = jax.tree.map(lambda a: jnp.asarray(a, dtype), variables)
    x = np.asarray(jnp.asarray(X, dtype))
    quantized = quantize("aquant", 8, 8, net=(apply, half), calibration=x)
    y = quantized(x)
    assert y.dtype == apply(half, x).dtype
    assert relative_error(y, apply(variables, X)) < 0.05


def test_layer_units():
    quantized = quantize("adaround", 8, 8)
    assert [len(r.layers) for r in quantized.reports] == [1, 1, 1, 1]
    apply, variables = small_net()
    assert relative_error(quantized(X), apply(variables, X)) < 0.02


@pytest.mark.parametrize(("name", "granularity"), [("linear", "element"), ("test_wave", "mean")])
def test_other_border_functions_go_through(name, granularity):
    def init(shape, half):
        return {"a": jnp.full(shape, half, jnp.float32), "b": jnp.zeros(shape, jnp.float32)}

    aq.register_border("test_wave", init, lambda c, u: c["a"] + c["b"] * jnp.sin(u))
    try:
        quantized = quantize("aquant", border=name, border_granularity=granularity)
        entry = quantized.summary()[1]
        assert set(entry.border) == set(border.get(name).init((1, 1), 0.5))
        assert any((c != c.flat[0]).any() for c in entry.border.values())
    finally:
        del border.BORDERS["test_wave"]


def test_signed_activations_have_a_zero_point():
    def apply(v, x):
        return jnp.tanh(x @ v["a"]) @ v["b"]

    variables = {"a": normal(rng_of(0), 6, 5), "b": normal(rng_of(1), 5, 4)}
    x = normal(rng_of(2), 64, 6)
    quantized = quantize("aquant", 8, 8, net=(apply, variables), calibration=x)
    entry = quantized.summary()[1]
    assert 0 < entry.zero_point < 255
    assert relative_error(quantized(x), apply(variables, x)) < 0.02


class NoColumns(ReferenceBackend):
    """Refuses to make columns."""

    def convolve(self, *_):
        raise AssertionError("a convolution ran over columns")


def test_one_border_a_channel_is_learned_without_columns():
    apply, variables = small_net()
    fields = {"batch_size": 8, "steps": 60, "weight_lr": 2e-2, "border_lr": 1e-2}
    recipe = aq.recipes.aquant(2, 2, border_granularity="channel", **fields)
    compiler = aq.Compiler(NoColumns())
    found = aq.quantize(apply, variables, X, recipe, observer=aq.Observer(), compiler=compiler)
    layers = {layer.path: layer for layer in found.summary()}
    assert {layer.border_granularity for layer in layers.values()} == {"channel"}
    for path in ("block_1/conv1/kernel", "block_1/conv2/kernel", "head/kernel"):
        assert {c.shape for c in layers[path].border.values()} == {(1, 4)}
        assert np.abs(layers[path].border["b0"] - 0.5).max() > 0.01
    nearest = {report.name: report.final_error for report in quantize("nearest", 2, 2).reports}
    learned = {report.name: report.final_error for report in found.reports}
    assert learned.keys() == nearest.keys()
    for name in ("block_1", "head"):
        assert learned[name] < 0.9 * nearest[name]
