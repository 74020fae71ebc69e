"""Weight scales learned with their rounding: the codes keep their grid, the scale moves."""

import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax.errors import InputError
from tests.reconstruction.test_optimize import block_problem, optimize, quantize, same

HEAD = {"pattern": "head", "keep_float": True}
STILL = {"weight_lr": 1e-12, "step_lr": 1e-12, "steps": 40}


def learned(**fields):
    return optimize(*block_problem("brecq", **STILL | fields))


def test_a_scale_alone_lowers_the_loss_and_moves_no_code():
    fixed, moved = learned(), learned(weight_scale_lr=1e-2)
    assert moved.curve[-1, 1] < 0.99 * fixed.curve[-1, 1]
    for one, two in zip(fixed.layers, moved.layers, strict=True):
        np.testing.assert_array_equal(one.codes, two.codes)
        np.testing.assert_array_equal(one.zero_point, two.zero_point)
        assert one.scale.shape == two.scale.shape
        ratio = np.asarray(two.scale / one.scale)
        assert (np.abs(ratio - 1) > 1e-3).all()
        assert len(np.unique(ratio)) > 1, "one scale per output channel"


def test_what_is_learned_is_what_is_deployed():
    """The error that the block is kept for is that of the layers with the moved scales."""
    network = quantize("qdrop", steps=100, weight_scale_lr=1e-2, weight_lr=1e-2)
    plain = quantize("qdrop", steps=100, weight_lr=1e-2)
    assert not any(report.fell_back_to_nearest for report in network.reports)
    assert network.reports[0].final_error < plain.reports[0].final_error


def test_layers_that_stay_float_have_none():
    one, two = (quantize("qdrop", overrides=(HEAD,), weight_scale_lr=rate) for rate in (0, 1e-2))
    np.testing.assert_array_equal(*(q.layers["head/kernel"].codes for q in (one, two)))
    assert two.layers["head/kernel"].scale.size == 0


def test_zero_is_off():
    assert aq.recipes.qdrop().reconstruction.weight_scale_lr == 0
    assert same(quantize("qdrop"), quantize("qdrop", weight_scale_lr=0))
    assert not same(quantize("qdrop"), quantize("qdrop", weight_scale_lr=1e-2))


@pytest.mark.parametrize("rate", [-1e-3, float("nan")])
def test_a_wrong_rate_is_named(rate):
    with pytest.raises(InputError, match=f"weight_scale_lr is {rate}"):
        aq.recipes.qdrop(weight_scale_lr=rate)
