"""A run within less memory: where caches lie and how a batch is divided changes no result."""

import errno
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax.errors import InputError
from aquant_jax.reconstruction import memory
from aquant_jax.reconstruction.memory import DEVICE, DISK
from tests.support.nets import images, two_convolutions

SAMPLES = 24
COMPILER = aq.Compiler()


def recipe(**fields):
    fields = {"steps": 6, "batch_size": 8, "init_samples": 16, **fields}
    return aq.recipes.aquant(3, 3, **fields)


def run(monkeypatch, free=None, tmp_path=None, **fields):
    """A quantized network, and its memory plan."""
    plans = []

    class Plans(aq.Observer):
        def on_memory(self, plan):
            plans.append(plan)

    apply, variables = two_convolutions()
    with monkeypatch.context() as patch:
        if free is not None:
            patch.setattr(memory, "free_bytes", lambda limit=None: free)
        quantized = aq.quantize(
            apply,
            variables,
            images(0, SAMPLES),
            recipe(**fields),
            observer=Plans(),
            compiler=COMPILER,
            resume=tmp_path,
        )
    return quantized, plans[0]


def leaves(quantized):
    return jax.tree.leaves((quantized.layers, quantized.activations))


def losses(quantized):
    return np.concatenate([report.loss_curve[:, 1] for report in quantized.reports])


@pytest.fixture(scope="module")
def whole():
    with pytest.MonkeyPatch.context() as patch:
        return run(patch)


@pytest.mark.parametrize("limit", [0, -1, 2.5, "4GiB", True])
def test_a_limit_is_a_number_of_bytes(limit):
    apply, variables = two_convolutions()
    with pytest.raises(InputError, match=r"memory_limit is .*; it must be a positive number"):
        aq.quantize(apply, variables, images(0, SAMPLES), recipe(), memory_limit=limit)


def test_parts_must_divide_a_batch():
    with pytest.raises(InputError, match=r"accumulate is 3, which does not divide batch_size 8"):
        recipe(accumulate=3)


@pytest.fixture
def nothing_but_caches(monkeypatch):
    for name in ("STEP_COPIES", "STATE_COPIES", "FORWARD_COPIES", "FORWARD_STATE_COPIES"):
        monkeypatch.setattr(memory, name, 0)


def test_caches_on_disk_give_the_same_bits(monkeypatch, tmp_path, whole, nothing_but_caches):
    quantized, plan = whole
    assert set(plan.places) == {DEVICE}
    other, small = run(monkeypatch, 0, tmp_path / "blocks")
    assert set(small.places) == {DISK}
    for a, b in zip(leaves(quantized), leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(losses(quantized), losses(other))
    reports = zip(quantized.reports, other.reports, strict=True)
    assert all(a.final_error == b.final_error for a, b in reports)


def test_only_the_largest_caches_leave_the_device(monkeypatch, whole):
    quantized, plan = whole
    caches = {i: sum(block.caches) for i, block in enumerate(plan.blocks)}
    needed = [plan.needs(i)[DEVICE] for i in caches]
    other, mixed = run(monkeypatch, max(needed) - 1)
    assert set(mixed.places) == {DEVICE, DISK}
    for a, b in zip(leaves(quantized), leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_full_disk_is_one_line(monkeypatch, tmp_path, nothing_but_caches):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"blocks: \S+ [KM]iB of .* \(No space left on device\)"):
        run(monkeypatch, 0, tmp_path / "blocks")


def test_too_small_a_disk_is_found_before_the_first_block(monkeypatch, nothing_but_caches):
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(InputError, match=r"on disk, and 0 bytes are free there; choose another"):
        run(monkeypatch, 0)


def test_parts_of_a_batch_add_up_to_it(monkeypatch, whole):
    """The masks and the batches are those of the whole; sums are in another order."""
    other, plan = run(monkeypatch, accumulate=2)
    np.testing.assert_allclose(losses(other), losses(whole[0]), rtol=2e-3)
    steps = [block.step for block in plan.blocks]
    assert steps == [block.step // 2 for block in whole[1].blocks]


def test_rematerialized_layers_learn_the_same(monkeypatch, whole):
    other, plan = run(monkeypatch, rematerialize=True)
    np.testing.assert_allclose(losses(other), losses(whole[0]), rtol=2e-3)
    for block, before in zip(plan.blocks, whole[1].blocks, strict=True):
        assert block.step < before.step


def test_a_block_that_does_not_fit_is_named_with_both_sizes(monkeypatch, tmp_path):
    apply, variables = two_convolutions()
    monkeypatch.setattr(memory, "free_bytes", lambda limit=None: 1000)
    with pytest.raises(
        InputError,
        match=r"block 0 \S+ needs about \S+ [KM]iB of memory on \S+, and 1000 bytes .*; lower",
    ):
        aq.quantize(
            apply, variables, images(0, SAMPLES), recipe(), observer=aq.Observer(),
            resume=tmp_path / "blocks",
        )  # fmt: skip
    assert not (tmp_path / "blocks").exists()
