"""``border="auto"`` keeps the cheapest border that is good enough; overrides set one by hand."""

import functools

import jax
import numpy as np
import pytest

import aquant_jax as aq
import gpu_ops
from tests.support.nets import assert_same_network, images, normal, rng_of, small_net
from tests.support.observers import Recorder

X = images(0, 24, size=5)
COMPILER = aq.Compiler()
AUTO = aq.recipes.aquant(3, 3, steps=4, batch_size=8, border="auto")


def quantize(recipe, observer=None, **more):
    apply, variables = small_net()
    observer = observer or aq.Observer()
    return aq.quantize(apply, variables, X, recipe, observer=observer, compiler=COMPILER, **more)


@functools.cache
def chosen_at(tolerance):
    return quantize(AUTO.replace(border_tolerance=tolerance))


def borders(network):
    """Name and granularity of every layer's border, and the shape of its coefficients."""
    return {
        layer.path: (layer.border_function, layer.border_granularity, np.shape(layer.border["b0"]))
        for layer in network.summary() if layer.border is not None
    }  # fmt: skip


@pytest.mark.parametrize(
    "tolerance", [*(pytest.param(t, marks=pytest.mark.slow) for t in (0.0, 0.011)), 10.0]
)
def test_the_first_within_the_tolerance_is_kept(tolerance):
    """What is reported was tried from the cheapest on; only the last may be within it."""
    network = chosen_at(tolerance)
    functions = borders(network)
    for report in network.reports:
        (_, dearest, bound), *tried = report.candidates
        costs = [coefficients for _, coefficients, _ in tried]
        assert costs == sorted(set(costs))
        assert all(cost < dearest for cost in costs)
        within = [error <= bound * (1 + tolerance) for *_, error in tried]
        assert not any(within[:-1])
        kept = tried[-1] if within and within[-1] else report.candidates[0]
        for path in report.layers:
            expected = None if kept[1] == 0 else tuple(kept[0].split())
            assert functions.get(path, (None,))[:2] == (expected or (None,))


@pytest.mark.parametrize(
    ("tolerance", "border"),
    [
        pytest.param(0.0, ("quadratic", "element", (9, 4)), marks=pytest.mark.slow),
        (0.011, ("quadratic", "channel", (1, 4))),
        (10.0, None),
    ],
)
def test_tolerance_decides(tolerance, border):
    assert borders(chosen_at(tolerance)).get("block_1/conv1/kernel") == border


def test_nothing_is_learned_from_the_samples_held_out(monkeypatch):
    from aquant_jax.reconstruction import optimize

    drawn = []
    draw = optimize.draw_batches

    def recorded(rng, samples, *sizes):
        drawn.append(samples)
        return draw(rng, samples, *sizes)

    monkeypatch.setattr(optimize, "draw_batches", recorded)
    quantize(AUTO.replace(border_tolerance=10.0, finetune_held_out=0.25))
    assert {len(samples) for samples in drawn} == {18}


def test_the_choice_is_deployed_saved_and_restored(tmp_path):
    network = chosen_at(0.011)
    aq.save(network, tmp_path / "saved")
    restored = aq.restore(tmp_path / "saved")
    np.testing.assert_array_equal(restored(X), network(X))
    np.testing.assert_array_equal(network.with_backend(gpu_ops.backend())(X), network(X))
    assert borders(restored) == borders(network)
    assert restored.recipe == network.recipe


def test_its_recipe_quantizes_with_the_same_borders_and_tries_nothing():
    network = quantize(chosen_at(0.011).recipe)
    assert borders(network) == borders(chosen_at(0.011))
    assert all(report.candidates == () for report in network.reports)


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path):
    class StopHereError(Exception):
        pass

    def stop(report):
        if report.index == 1:
            raise StopHereError

    recipe = AUTO.replace(border_tolerance=0.011)
    with pytest.raises(StopHereError):
        quantize(recipe, Recorder(stop), resume=tmp_path)
    again = quantize(recipe, resume=tmp_path)
    assert_same_network(again, chosen_at(0.011))
    for one, two in zip(again.reports, chosen_at(0.011).reports, strict=True):
        assert one.candidates == two.candidates


def test_the_whole_network_stage_learns_the_chosen_borders():
    recipe = AUTO.replace(border_tolerance=0.011, finetune_steps=3, finetune_eval_every=1)
    network = quantize(recipe)
    assert borders(network) == borders(chosen_at(0.011))
    stage = network.reports[-1]
    assert stage.best_step > 0
    learned = network.layers["block_1/conv1/kernel"].border
    before = chosen_at(0.011).layers["block_1/conv1/kernel"].border
    assert jax.tree.map(np.shape, learned) == jax.tree.map(np.shape, before)
    assert any((np.asarray(learned[name]) != np.asarray(before[name])).any() for name in learned)


def test_a_users_override_is_kept():
    fixed = aq.Override("head", border="constant", border_granularity="channel")
    network = quantize(AUTO.replace(border_tolerance=10.0, overrides=(fixed,)))
    assert borders(network) == {"head/kernel": ("constant", "channel", (1, 4))}
    assert network.reports[-1].candidates[1:] == ()


def test_overrides_set_the_border_of_a_layer():
    overrides = (
        aq.Override("conv", border="linear", border_granularity="channel"),
        aq.Override("conv2", border="nearest"),
    )
    network = quantize(aq.recipes.aquant(3, 3, steps=2, batch_size=8, overrides=overrides))
    assert borders(network) == {
        "block_1/conv1/kernel": ("linear", "channel", (1, 4)),
        "head/kernel": ("quadratic", "element", (1, 4)),
    }
    integer = network.with_backend(gpu_ops.backend())
    np.testing.assert_array_equal(integer(X), network(X))


def test_a_dense_layer_does_not_try_an_element_and_a_channel():
    rng = rng_of(0)
    variables = {"a": normal(rng, 6, 8)}
    recipe = AUTO.replace(border_tolerance=0.0, quantize_input=True)
    network = aq.quantize(
        lambda v, x: jax.nn.relu(x @ v["a"]), variables, normal(rng, 24, 6), recipe,
        observer=aq.Observer(), compiler=COMPILER,
    )  # fmt: skip
    tried = [name for name, *_ in network.reports[0].candidates]
    names = ["nearest element", "constant channel", "linear channel"]
    assert tried == ["quadratic element", *names[: len(tried) - 1]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"border_tolerance": -0.1}, r"^border_tolerance is -0\.1; it must be 0 or more"),
        (
            {"finetune_held_out": 0.9},
            r"^finetune_held_out 0\.9 holds out 22 of 24 samples and leaves 2, fewer than "
            r"batch_size 8$",
        ),
        ({"overrides": [{"pattern": "head", "border": "cubic"}]}, "^unknown border 'cubic'; known"),
        ({"overrides": [{"pattern": "head", "border": 2}]}, "^border is 2; it must be of type str"),
        (
            {"overrides": [{"pattern": "head", "border_granularity": "tap"}]},
            "^border_granularity is 'tap'; known: element, mean, channel",
        ),
    ],
)
def test_wrong_fields_are_one_line(fields, message):
    with pytest.raises(aq.InputError, match=message):
        quantize(AUTO.replace(**fields))


def test_an_override_without_taps_for_a_border_that_needs_them_is_one_line():
    def nothing(*args):
        raise AssertionError("never called")

    aq.register_border("needs taps", nothing, nothing, needs_taps=True)
    override = aq.Override("head", border="needs taps", border_granularity="channel")
    with pytest.raises(aq.InputError, match=r"^border 'needs taps' depends on the tap; "):
        quantize(aq.recipes.aquant(3, 3, steps=1, batch_size=8, overrides=(override,)))


@pytest.mark.parametrize("name", ["auto", "nearest"])
def test_their_names_are_reserved(name):
    with pytest.raises(aq.InputError, match=f"^border '{name}' has a meaning in recipes"):
        aq.register_border(name, lambda shape, half: {}, lambda coefficients, u: u)
