"""Whether the outputs of a sample depend on the other samples of its batch.

Batch normalization in training mode is the common cause: its means and variances are those of the
batch. Two traces tell which op could mix samples; only then is the network run, to see if it does.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from aquant_jax.graph.ir import Graph
from aquant_jax.graph.targets import needed_ops
from aquant_jax.plan.network import Network, take_samples

TOLERANCE = 1e-3  # of the largest output: floats are added up in another order


def find_mixing(graph: Graph, other: Graph) -> str | None:
    """The first op that makes something without samples of a value with samples, such as a mean
    over the batch, and that an output with samples depends on; None where there is none.

    Args:
      graph: the network, with its targets.
      other: the same function, traced with more samples.
    """

    def has_samples(value: int) -> bool:
        more = other.avals.get(value)
        return more is not None and graph.avals[value].shape != more.shape

    layer = "the input"
    for op in needed_ops(graph):
        read = [value for value in op.reads if value in graph.dynamic]
        if any(map(has_samples, read)) and not any(map(has_samples, op.outputs)):
            return f"{op.name} behind {layer}"
        layer = op.layer.path if op.layer else layer
    return None


def warn_if_samples_mix(net: Network, calibration: Any) -> None:
    """Log a warning if outputs of the float network change with the other samples of the batch."""
    if net.mixing is None or net.batch < 2:
        return
    change, largest = _change(net, calibration)
    if change > TOLERANCE * largest:
        logging.warning(
            "outputs of a sample depend on the others in its batch, by up to %.3g, where the "
            "largest output is %.3g (%s): batch norm should normalize by its running statistics",
            change, largest, net.mixing,
        )  # fmt: skip


def _change(net: Network, calibration: Any) -> tuple[float, float]:
    """The largest change of an output in other company, and the largest output.

    Both batches have as many samples, so that one program computes both, in one order of additions;
    in the second, copies of the first sample stand for the second half of the first batch.
    """
    kept = net.batch // 2
    rows = np.arange(net.batch)
    function = jax.jit(lambda *arguments: net.apply(*arguments))
    both = [
        jax.tree.leaves(function(net.variables, _samples(calibration, index)))
        for index in (rows, np.where(rows < kept, rows, 0))
    ]
    change = largest = 0.0
    for position in net.targets:
        one, two = (np.asarray(outputs[position]) for outputs in both)
        if jnp.issubdtype(one.dtype, jnp.inexact) and one.shape[:1] == (net.batch,):
            wide = np.complex128 if np.iscomplexobj(one) else np.float64
            one, two = one[:kept].astype(wide), two[:kept].astype(wide)
            largest = max(largest, _largest(one))
            change = max(change, _largest(one - two))
    return change, largest


def _samples(calibration: Any, index: np.ndarray) -> Any:
    return jax.tree.map(lambda leaf: take_samples(leaf, index), calibration)


def _largest(values: np.ndarray) -> float:
    """The largest absolute value of those that are finite."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max(initial=0.0))
