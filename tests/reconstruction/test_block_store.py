"""An interrupted quantization resumes after its last finished block, bit for bit."""

import functools
import json
import os
import shutil

import jax
import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax.errors import InputError
from aquant_jax.storage import archive
from tests.support.nets import assert_same_network, images, small_net
from tests.support.observers import Recorder
from tests.support.process import REPOSITORY

X = images(0, 12, size=5)
COMPILER = aq.Compiler()
RECIPE = aq.recipes.aquant(3, 3, steps=3, batch_size=4)
OTHER = RECIPE.replace(steps=6, step_lr=1e-2)


class StopHereError(Exception):
    pass


def quantize(recipe=RECIPE, x=X, seed=0, observer=None, **more):
    apply, variables = small_net()
    observer = observer or aq.Observer()
    return aq.quantize(
        apply, variables, x, recipe, seed=seed, observer=observer, compiler=COMPILER, **more
    )


@functools.cache
def uninterrupted():
    return quantize()


def interrupt_after(count, folder, **more):
    def stop(report):
        if report.index + 1 == count:
            raise StopHereError

    with pytest.raises(StopHereError):
        quantize(resume=folder, observer=Recorder(stop), **more)


# With one block: test_an_interrupted_call_resumes_with_more_seeds in tests/test_quantize_seeds.py.
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_resumes_to_the_same_bits(tmp_path, count, caplog):
    interrupt_after(count, tmp_path)
    observer = Recorder()
    caplog.set_level("INFO", "absl")
    again = quantize(resume=tmp_path, observer=aq.Observers(observer, aq.LogObserver()))
    assert observer.learned == list(range(count, 3))
    lines = [line for line in caplog.messages if line.startswith("block ")]
    assert [": read, error " in line for line in lines] == [True] * count + [False] * (3 - count)
    assert [": learned in " in line for line in lines] == [False] * count + [True] * (3 - count)
    assert_same_network(again, uninterrupted())
    assert [r.index for r in observer.reports] == [0, 1, 2]
    for one, two in zip(again.reports, uninterrupted().reports, strict=True):
        assert (one.name, one.layers, one.steps) == (two.name, two.layers, two.steps)
        assert (one.start_error, one.final_error) == (two.start_error, two.final_error)
        np.testing.assert_array_equal(one.loss_curve, two.loss_curve)
        np.testing.assert_array_equal(one.propagated, two.propagated)


def test_a_finished_one_learns_nothing(tmp_path):
    quantize(resume=tmp_path)
    observer = Recorder()
    assert_same_network(quantize(resume=tmp_path, observer=observer), uninterrupted())
    assert observer.learned == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X + 1}, r"calibration \('"),
        ({"seed": 1}, r"seed \(0 there, 1 here\)"),
        ({"recipe": RECIPE.replace(steps=4)}, r"recipe\.reconstruction\.steps \(3 there, 4 here\)"),
        (
            {"recipe": RECIPE.replace(steps=4, quant_drop_prob=0.0), "seed": 2},
            r"recipe\.reconstruction\.quant_drop_prob \(0.5 there, 0.0 here\), .*steps .*seed",
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
    apply, variables = small_net(seed=1)
    with pytest.raises(InputError, match=r"which differs in weights \('"):
        aq.quantize(apply, variables, X, RECIPE, observer=aq.Observer(), resume=tmp_path)


def test_a_restart_learns_the_rest_by_another_recipe(tmp_path):
    first = quantize(resume=tmp_path)
    observer = Recorder()
    other = quantize(OTHER, observer=observer, resume=tmp_path, restart_from=2)
    assert observer.learned == [2]
    for path in ("stem/kernel", "block_1/conv1/kernel"):
        jax.tree.map(np.testing.assert_array_equal, other.layers[path], first.layers[path])
    assert other.activations["head/kernel"].step_size != first.activations["head/kernel"].step_size
    # It is now a run of the new recipe.
    again = Recorder()
    assert_same_network(quantize(OTHER, observer=again, resume=tmp_path), other)
    assert again.learned == []


@pytest.mark.parametrize(
    ("recipe", "first", "message"),
    [
        (
            RECIPE.replace(act_bits=4),
            1,
            r"recipe\.act_bits .* may change recipe\.reconstruction and augment only",
        ),
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
    with pytest.raises(InputError, match=r"restart_from is -1; it must be a whole number"):
        quantize(resume=tmp_path, restart_from=-1)
    assert archive.sizes(tmp_path) == before


def test_a_restart_forgets_blocks_behind_a_gap_too(tmp_path):
    quantize(resume=tmp_path)
    shutil.rmtree(tmp_path / "001")
    observer = Recorder()
    quantize(OTHER, observer=observer, resume=tmp_path, restart_from=1)
    assert observer.learned == [1, 2]


def test_another_network_of_the_same_layers_is_told(tmp_path):
    x = images(1, 4, size=2, channels=1).reshape(4, 4)
    variables = {"a": np.eye(4, dtype=np.float32), "b": np.eye(4, dtype=np.float32)}
    recipe = aq.recipes.nearest(batch_size=4)

    def run(function, shift):
        def apply(variables, x):
            return function(x @ variables["a"] + shift) @ variables["b"]

        return aq.quantize(apply, variables, x, recipe, observer=aq.Observer(), resume=tmp_path)

    run(jax.nn.relu, x[:1])
    run(jax.nn.relu, x[:1])
    with pytest.raises(InputError, match=r"which differs in network \("):
        run(jax.numpy.tanh, x[:1])
    with pytest.raises(InputError, match=r"which differs in constants \("):
        run(jax.nn.relu, x[1:2])


def test_half_precision_and_keys_have_fingerprints(tmp_path):
    variables = {"a": jax.numpy.eye(4, dtype=jax.numpy.bfloat16), "rng": jax.random.key(0)}
    x = images(1, 4, size=2, channels=1).reshape(4, 4)
    recipe = aq.recipes.nearest(batch_size=4)

    def run(variables):
        def apply(variables, x):
            return x.astype(jax.numpy.bfloat16) @ variables["a"]

        return aq.quantize(apply, variables, x, recipe, observer=aq.Observer(), resume=tmp_path)

    run(variables)
    run(variables)
    with pytest.raises(InputError, match=r"which differs in weights \("):
        run(variables | {"rng": jax.random.key(1)})


def test_a_restart_needs_a_folder():
    with pytest.raises(InputError, match="restart_from is 1, but resume is None"):
        quantize(restart_from=1)


def test_a_damaged_block_is_named(tmp_path):
    interrupt_after(1, tmp_path)
    index = tmp_path / "000" / archive.INDEX
    index.write_text(index.read_text().replace("stem", "stim"))
    with pytest.raises(InputError, match=r"000/index\.json is damaged"):
        quantize(resume=tmp_path)


def test_the_fingerprint_can_be_read(tmp_path):
    interrupt_after(1, tmp_path)
    call = json.loads((tmp_path / "fingerprint.json").read_text())["call"]
    assert call["recipe"]["reconstruction"]["steps"] == 3
    assert (call["layout"], call["seed"], call["backend"]) == (3, 0, "reference")
    assert call["versions"]["jax"] == jax.__version__
    digests = {call[name] for name in ("network", "weights", "calibration")}
    assert {len(digest) for digest in digests} == {64}
    assert len(digests) == 3


@pytest.mark.parametrize("first", [None, 1])
@pytest.mark.parametrize("layout", [1, 2])
def test_blocks_of_earlier_layouts_are_refused_and_stay(tmp_path, layout, first):
    folder = tmp_path / "blocks"
    shutil.copytree(REPOSITORY / "tests" / "golden" / f"layout_{layout}" / "blocks", folder)
    before = archive.sizes(folder)
    with pytest.raises(InputError) as refused:
        quantize(resume=folder, restart_from=first)
    assert str(refused.value) == f"{folder} holds blocks of {archive.written_by(layout)}"
    assert archive.sizes(folder) == before


def test_blocks_without_an_owner_are_refused(tmp_path):
    interrupt_after(1, tmp_path)
    (tmp_path / "fingerprint.json").unlink()
    before = archive.sizes(tmp_path)
    for first in (None, 0):
        message = "holds 000 of unknown origin: there is no fingerprint.json in it"
        with pytest.raises(InputError, match=message):
            quantize(RECIPE.replace(act_bits=4), resume=tmp_path, restart_from=first)
    assert archive.sizes(tmp_path) == before


@pytest.mark.parametrize("text", ["null", "[]", '{"call": 1, "kept": []}', '{"call": {}}', "{}"])
def test_a_damaged_owner_is_named(tmp_path, text):
    interrupt_after(1, tmp_path)
    (tmp_path / "fingerprint.json").write_text(text)
    with pytest.raises(InputError, match=r"fingerprint\.json is malformed"):
        quantize(resume=tmp_path)
    assert (tmp_path / "fingerprint.json").read_text() == text


@pytest.mark.parametrize("first", [None, 2])
def test_a_block_of_another_run_is_refused(tmp_path, first):
    interrupt_after(2, tmp_path / "ours")
    interrupt_after(1, tmp_path / "other", recipe=OTHER)
    shutil.rmtree(tmp_path / "ours" / "000")
    shutil.copytree(tmp_path / "other" / "000", tmp_path / "ours" / "000")
    message = r"000 is a block of another run, which differs in recipe\.reconstruction\.step_lr"
    with pytest.raises(InputError, match=message):
        quantize(resume=tmp_path / "ours", restart_from=first)


def test_kept_blocks_stay_those_of_the_call_that_learned_them(tmp_path):
    quantize(resume=tmp_path)
    for first, recipe in ((2, OTHER), (1, RECIPE), (2, OTHER)):
        quantize(recipe, resume=tmp_path, restart_from=first)
    interrupted = json.loads((tmp_path / "fingerprint.json").read_text())
    steps = [call["recipe"]["reconstruction"]["steps"] for call in interrupted["kept"]]
    assert steps == [3, 3]
    observer = Recorder()
    quantize(OTHER, resume=tmp_path, observer=observer)
    assert observer.learned == []


def test_a_folder_of_the_user_is_not_forgotten_as_a_block(tmp_path):
    quantize(resume=tmp_path)
    (tmp_path / "2026").mkdir()
    (tmp_path / "2026" / "photo.jpg").write_text("mine")
    before = archive.sizes(tmp_path)
    with pytest.raises(InputError, match=r"2026 is not a checkpoint: manifest\.json"):
        quantize(resume=tmp_path, restart_from=1)
    assert archive.sizes(tmp_path) == before


def test_one_call_at_a_time_uses_a_folder(tmp_path):
    def second(report):
        with pytest.raises(InputError, match=f"is in use by process {os.getpid()} on "):
            quantize(resume=tmp_path)

    assert_same_network(quantize(resume=tmp_path, observer=Recorder(second)), uninterrupted())
