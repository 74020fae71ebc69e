import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax.reconstruction.probe import Probe
from tests.support.nets import images, mlp, normal, residual_net, rng_of

X = images(0, 16, size=5)


def test_layers_come_with_the_most_sensitive_first():
    overrides = ({"pattern": "block_1/conv2", "weight_bits": 2, "act_bits": 2},
                 {"pattern": "stem", "keep_float": True})  # fmt: skip
    found = aq.sensitivity(*residual_net(), X, aq.recipes.qdrop(8, 8, overrides=overrides))
    assert {entry.path for entry in found} == {
        "stem/kernel", "block_1/conv1/kernel", "block_1/conv2/kernel", "head/kernel",
    }  # fmt: skip
    errors = [entry.error for entry in found]
    assert errors == sorted(errors, reverse=True)
    assert found[0].path == "block_1/conv2/kernel"
    assert found[0].error > 20 * found[1].error
    assert (found[-1].path, found[-1].error) == ("stem/kernel", pytest.approx(0.0, abs=1e-10))


def test_blocks_before_the_quantized_one_run_once(monkeypatch):
    """Three blocks: the float network, then the rest of it behind each layer."""
    ran, run = [], Probe._run
    monkeypatch.setattr(Probe, "_run", lambda self, i, *rest: ran.append(i) or run(self, i, *rest))
    aq.sensitivity(*mlp(), normal(rng_of(1), 16, 6), aq.recipes.nearest(3, 3))
    assert ran == [0, 1, 2, 0, 1, 2, 0, 1, 2, 1, 2]


def test_outputs_that_are_zero_have_no_error_and_nan_is_named():
    (apply, variables), x = mlp(sizes=(6, 4)), normal(rng_of(1), 16, 6)
    zeros = jax.tree.map(np.zeros_like, variables)
    assert [entry.error for entry in aq.sensitivity(apply, zeros, x, aq.recipes.nearest())] == [0]
    message = r"the float network itself computes NaN .* in its output float32\[16, 4\]"
    with pytest.raises(aq.ReconstructionError, match=message):
        aq.sensitivity(lambda v, x: jnp.log(apply(v, x) - 1), zeros, x, aq.recipes.nearest())


def test_bad_input_is_named():
    with pytest.raises(aq.InputError, match="matches none"):
        aq.sensitivity(*residual_net(), X, aq.recipes.qdrop(overrides=({"pattern": "no"},)))
    for calibration in ({}, X[:0], X[0, 0, 0, 0]):
        with pytest.raises(aq.InputError, match="calibration set"):
            aq.sensitivity(*residual_net(), calibration, aq.recipes.qdrop())
