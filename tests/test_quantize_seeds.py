"""Several seeds in one call: the bits of one call each, and the float network runs once."""

import functools

import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax.reconstruction import float_block
from tests.support.nets import assert_same_network, mlp, normal, rng_of
from tests.support.observers import Recorder

X = normal(rng_of(0), 12, 6)
SEEDS = (3, 0, 8)
RECIPE = aq.recipes.aquant_plus(3, 3, steps=3, batch_size=4, finetune_eval_every=1)
COMPILER = aq.Compiler()


def call(function, *args, **more):
    apply, variables = mlp()
    return function(apply, variables, X, RECIPE, *args, compiler=COMPILER, **more)


@functools.cache
def of_seed(seed):
    return call(aq.quantize, seed=seed, observer=aq.Observer())


def test_every_seed_has_the_bits_of_a_call_of_its_own():
    networks = call(aq.quantize_seeds, SEEDS)
    for seed, network in zip(SEEDS, networks, strict=True):
        assert_same_network(network, of_seed(seed))
    assert (np.asarray(networks[0](X)) != np.asarray(networks[1](X))).any()


def test_ranges_are_searched_once_a_block(monkeypatch):
    searched = []
    search = float_block.observe_ranges
    monkeypatch.setattr(
        float_block, "observe_ranges", lambda *args: searched.append(args) or search(*args)
    )
    one, two = call(aq.quantize_seeds, (0, 1))
    assert len(searched) == len([r for r in one.reports if isinstance(r, aq.BlockReport)])
    assert len(one.reports) == len(two.reports)


def test_an_interrupted_call_resumes_with_more_seeds(tmp_path):
    """The second seed stops in its second block, which the first seed has finished."""

    class StopHereError(Exception):
        pass

    def stop(report):
        if report.index == 1:
            raise StopHereError

    observers = [Recorder(), Recorder(stop)]
    with pytest.raises(StopHereError):
        call(aq.quantize_seeds, (3, 0), observers=observers, resume=tmp_path)
    assert [len(observer.reports) for observer in observers] == [2, 2]
    observers = [Recorder() for _ in SEEDS]
    networks = call(aq.quantize_seeds, SEEDS, observers=observers, resume=tmp_path)
    for seed, network in zip(SEEDS, networks, strict=True):
        assert_same_network(network, of_seed(seed))
    blocks = len(networks[0].reports)
    expected = [list(range(2, blocks)), list(range(2, blocks)), list(range(blocks))]
    assert [observer.learned for observer in observers] == expected


def test_a_single_call_goes_on_where_a_seed_stopped(tmp_path):
    call(aq.quantize_seeds, (0,), observers=[aq.Observer()], resume=tmp_path)
    observer = Recorder()
    again = call(aq.quantize, seed=0, observer=observer, resume=tmp_path / "seed-0")
    assert_same_network(again, of_seed(0))
    assert observer.learned == []


@pytest.mark.parametrize(
    ("seeds", "observers", "message"),
    [
        ((), None, r"^seeds are \[\]; they must be different, and one or more$"),
        ((0, 1, 0), None, r"^seeds are \[0, 1, 0\]; they must be different"),
        (3, None, r"^seeds is 3; it must be a list, such as \(0, 1, 2\)$"),
        ((0, -1), None, r"^seed is -1; it must be a whole number"),
        ((0, 1), [aq.Observer()], r"^1 observers for 2 seeds$"),
    ],
)
def test_wrong_seeds_are_one_line_and_write_nothing(tmp_path, seeds, observers, message):
    with pytest.raises(aq.InputError, match=message):
        call(aq.quantize_seeds, seeds, observers=observers, resume=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
