"""Initial step sizes: the range search over activations of the float network."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence

import jax
import numpy as np

from aquant_jax.arithmetic.range_search import search_activation_range
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.errors import ReconstructionError
from aquant_jax.graph.subgraph import source_tensor
from aquant_jax.plan.block_program import BlockProgram, make_block_program, valid_elements
from aquant_jax.plan.network import Network
from aquant_jax.reconstruction.activation_cache import one_ahead
from aquant_jax.reconstruction.devices import read

MOST_ELEMENTS = 2**23  # of a tensor, in a histogram of 2^12 bins

# Runs a program in float, batch by batch: (indices of the samples, outputs).
RunFloat = Callable[[BlockProgram], Iterable[tuple[np.ndarray, Sequence[jax.Array]]]]


def observe_ranges(
    net: Network,
    programs: Sequence[BlockProgram],
    run_float: RunFloat,
    known: Collection[str] = (),
) -> dict[str, ActivationQuantizer]:
    """Step size and zero point of the tensors that `programs` read, by MSE search.

    Args:
      net: the network.
      programs: programs that start at the same boundary.
      run_float: runs a program that starts there too, on the samples to look at.
      known: keys of tensors to leave out.

    Returns:
      Quantizers by key, in the order in which the programs read them.

    Raises:
      ReconstructionError: a tensor holds NaN or infinity.
    """
    wanted: dict[str, tuple[int, int]] = {}
    for program in programs:
        for value, index in program.tensor_of.items():
            tensor = program.tensors[index]
            if tensor.key not in known:
                source = source_tensor(program.producers, value)
                wanted.setdefault(tensor.key, (source, tensor.bits))
    if not wanted:
        return {}
    boundary = programs[0].subgraph.boundary_inputs
    values = tuple(value for value, _ in wanted.values())
    probe = make_block_program(net.graph, net.plan, boundary, values)
    samples = min(net.recipe.reconstruction.init_samples, net.samples)
    totals = [samples * math.prod(probe.avals[value].shape[1:]) for value in values]
    made_by = probe.producers
    steps = [made_by[value].steps if value in made_by else 1 for value in values]
    found = [_Elements(total * count) for total, count in zip(totals, steps, strict=True)]
    for rows, outputs in one_ahead(run_float(probe)):
        for elements, value, axes in zip(found, outputs, probe.position_axes, strict=True):
            elements.add(_valid_values(net, rows, value, axes))
    quantizers = {}
    for (key, (_, bits)), elements in zip(wanted.items(), found, strict=True):
        low, high = elements.ends
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ReconstructionError(f"{key}: its float input holds NaN or infinity")
        quantizers[key] = search_activation_range(np.concatenate(elements.parts), bits, (low, high))
    return quantizers


class _Elements:
    """The elements of a tensor that its histogram counts, and the ends of all of them.

    Of more than `MOST_ELEMENTS`, that many are drawn at random, the same ones in every run.

    Args:
      total: number of elements to come.
    """

    def __init__(self, total: int) -> None:
        self._share = min(1.0, MOST_ELEMENTS / max(total, 1))
        self._rng = np.random.default_rng(0)
        self.parts: list[np.ndarray] = []
        self.ends = (np.inf, -np.inf)

    def add(self, values: np.ndarray) -> None:
        """Add those of a batch."""
        if not values.size:
            return
        low, high = self.ends
        # NaN passes through numpy's minimum and maximum.
        self.ends = (
            float(np.minimum(low, values.min())), float(np.maximum(high, values.max()))
        )  # fmt: skip
        if self._share < 1.0:
            count = math.ceil(self._share * values.size)
            values = values[self._rng.integers(0, values.size, count)]
        self.parts.append(values)


def _valid_values(
    net: Network, rows: np.ndarray, value: jax.Array, axes: tuple[int, ...]
) -> np.ndarray:
    """The elements of one batch that are not padding, flat float32."""
    values = np.asarray(read(value), np.float32)
    if net.valid_mask is not None and axes:
        valid = valid_elements(net.valid_mask[rows], axes, values.ndim)
        values = values[np.broadcast_to(valid, values.shape)]
    return values.ravel()
