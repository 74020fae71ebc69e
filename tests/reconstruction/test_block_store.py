"""A quantization that was interrupted goes on after its last finished block, to the same bits."""

import functools
import importlib
import json
import shutil

import jax
import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax.errors import InputError
from aquant_jax.storage import archive
from tests.support.nets import images, residual_net

pytestmark = pytest.mark.user_model  # optax promotes
X = images(0, 12, size=5)
COMPILER = aq.Compiler()
RECIPE = aq.recipes.aquant(3, 3, steps=3, batch_size=4)

spine = importlib.import_module("aquant_jax.quantize")


class StopHereError(Exception):
    pass


def quantize(recipe=RECIPE, x=X, seed=0, **more):
    apply, variables = residual_net()
    return aq.quantize(
        apply, variables, x, recipe, seed=seed, progress=False, compiler=COMPILER, **more
    )


@functools.cache
def whole():
    return quantize()


def interrupt_after(count, folder, **more):
    def stop(report):
        if report.index + 1 == count:
            raise StopHereError

    with pytest.raises(StopHereError):
        quantize(resume=folder, on_block=stop, **more)


def assert_same(one, two):
    for name in ("layers", "tensors", "static"):
        jax.tree.map(np.testing.assert_array_equal, getattr(one, name), getattr(two, name))


@pytest.fixture
def learned(monkeypatch):
    """The numbers of the blocks that were learned."""
    numbers = []
    learn = spine._Run._learn
    monkeypatch.setattr(
        spine._Run, "_learn", lambda self, i, *rest: numbers.append(i) or learn(self, i, *rest)
    )
    return numbers


@pytest.mark.parametrize("count", [1, 2])
def test_goes_on_to_the_same_bits(tmp_path, learned, count):
    interrupt_after(count, tmp_path)
    learned.clear()
    reports = []
    again = quantize(resume=tmp_path, on_block=reports.append)
    assert learned == list(range(count, 3))
    assert_same(again, whole())
    assert [r.index for r in reports] == [0, 1, 2]
    for one, two in zip(again.reports, whole().reports, strict=True):
        assert (one.name, one.layers, one.steps) == (two.name, two.layers, two.steps)
        assert (one.start_error, one.final_error) == (two.start_error, two.final_error)
        np.testing.assert_array_equal(one.loss_curve, two.loss_curve)
        np.testing.assert_array_equal(one.propagated, two.propagated)


def test_a_finished_one_learns_nothing(tmp_path, learned):
    quantize(resume=tmp_path)
    learned.clear()
    assert_same(quantize(resume=tmp_path), whole())
    assert learned == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X + 1}, r"calibration \('"),
        ({"seed": 1}, r"seed \(0 there, 1 here\)"),
        ({"recipe": RECIPE.replace(steps=4)}, r"recipe\.steps \(3 there, 4 here\)"),
        (
            {"recipe": RECIPE.replace(steps=4, drop=0.0), "seed": 2},
            r"recipe\.drop \(0.5 there, 0.0 here\), recipe\.steps .*seed",
        ),
    ],
)
def test_another_call_is_told_by_what_differs(tmp_path, change, message):
    interrupt_after(1, tmp_path)
    before = archive.sizes(tmp_path)
    with pytest.raises(InputError, match=f"another run, which differs in {message}"):
        quantize(resume=tmp_path, **change)
    assert archive.sizes(tmp_path) == before


def test_other_weights_are_told(tmp_path):
    interrupt_after(1, tmp_path)
    apply, variables = residual_net(seed=1)
    with pytest.raises(InputError, match=r"which differs in weights \('"):
        aq.quantize(apply, variables, X, RECIPE, progress=False, resume=tmp_path)


def test_a_restart_learns_the_rest_by_another_recipe(tmp_path, learned):
    first = quantize(resume=tmp_path)
    learned.clear()
    longer = RECIPE.replace(steps=6, step_lr=1e-2)
    other = quantize(longer, resume=tmp_path, restart_from=2)
    assert learned == [2]
    for path in ("stem/kernel", "block_1/conv1/kernel"):
        jax.tree.map(np.testing.assert_array_equal, other.layers[path], first.layers[path])
    assert other.tensors["head/kernel"].step_size != first.tensors["head/kernel"].step_size
    # It is now a run of the new recipe.
    learned.clear()
    assert_same(quantize(longer, resume=tmp_path), other)
    assert learned == []


@pytest.mark.parametrize(
    ("recipe", "first", "message"),
    [
        (RECIPE.replace(act_bits=4), 1, r"recipe\.act_bits .* may change how blocks are learned"),
        (RECIPE, 2, r"restart from block 2: .* has 1 finished blocks"),
    ],
)
def test_a_wrong_restart_loses_nothing(tmp_path, recipe, first, message):
    interrupt_after(1, tmp_path)
    before = archive.sizes(tmp_path)
    with pytest.raises(InputError, match=message):
        quantize(recipe, resume=tmp_path, restart_from=first)
    assert archive.sizes(tmp_path) == before


def test_a_restart_from_a_negative_block_forgets_none(tmp_path):
    interrupt_after(2, tmp_path)
    before = archive.sizes(tmp_path)
    with pytest.raises(InputError, match=r"restart from block -1: .* has 2 finished blocks"):
        quantize(resume=tmp_path, restart_from=-1)
    assert archive.sizes(tmp_path) == before


def test_a_restart_forgets_blocks_behind_a_gap_too(tmp_path, learned):
    quantize(resume=tmp_path)
    shutil.rmtree(tmp_path / "001")
    learned.clear()
    quantize(RECIPE.replace(steps=4), resume=tmp_path, restart_from=1)
    assert learned == [1, 2]


def test_another_network_of_the_same_layers_is_told(tmp_path):
    x = images(1, 4, size=2, channels=1).reshape(4, 4)
    variables = {"a": np.eye(4, dtype=np.float32), "b": np.eye(4, dtype=np.float32)}
    recipe = aq.recipes.nearest(batch_size=4)

    def run(function, shift):
        def apply(variables, x):
            return function(x @ variables["a"] + shift) @ variables["b"]

        return aq.quantize(apply, variables, x, recipe, progress=False, resume=tmp_path)

    run(jax.nn.relu, x[0])
    run(jax.nn.relu, x[0])
    with pytest.raises(InputError, match=r"which differs in network \("):
        run(jax.numpy.tanh, x[0])
    with pytest.raises(InputError, match=r"which differs in constants \("):
        run(jax.nn.relu, x[1])


def test_half_precision_and_keys_have_fingerprints(tmp_path):
    variables = {"a": jax.numpy.eye(4, dtype=jax.numpy.bfloat16), "rng": jax.random.key(0)}
    x = images(1, 4, size=2, channels=1).reshape(4, 4)
    recipe = aq.recipes.nearest(batch_size=4)

    def run(variables):
        def apply(variables, x):
            return x.astype(jax.numpy.bfloat16) @ variables["a"]

        return aq.quantize(apply, variables, x, recipe, progress=False, resume=tmp_path)

    run(variables)
    run(variables)
    with pytest.raises(InputError, match=r"which differs in weights \("):
        run(variables | {"rng": jax.random.key(1)})


def test_a_restart_needs_a_folder():
    with pytest.raises(InputError, match="restart_from is 1, and resume names no folder"):
        quantize(restart_from=1)


def test_a_damaged_block_is_named(tmp_path):
    interrupt_after(1, tmp_path)
    index = tmp_path / "000" / archive.INDEX
    index.write_text(index.read_text().replace("stem", "stim"))
    with pytest.raises(InputError, match=r"000/index\.json is damaged"):
        quantize(resume=tmp_path)


def test_the_fingerprint_can_be_read(tmp_path):
    interrupt_after(1, tmp_path)
    call = json.loads((tmp_path / "run.json").read_text())
    assert {"network", "weights", "calibration", "recipe", "seed", "device", "versions"} <= set(
        call
    )
    assert call["versions"]["jax"] == jax.__version__
