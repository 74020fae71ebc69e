"""Initial step sizes: the range search over activations of the float network."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic.range_search import Histogram, make_histogram, search_histograms
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.errors import ReconstructionError
from aquant_jax.graph.subgraph import source_tensor
from aquant_jax.plan.block_program import BlockProgram, make_block_program, valid_elements
from aquant_jax.plan.network import Network
from aquant_jax.reconstruction.activation_cache import one_ahead
from aquant_jax.reconstruction.devices import (
    count,
    of_processes,
    parts,
    read,
    several_processes,
    split_rows,
)

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
    found = [_Elements(total * times) for total, times in zip(totals, steps, strict=True)]
    for rows, outputs in one_ahead(run_float(probe)):
        for elements, value, axes in zip(found, outputs, probe.position_axes, strict=True):
            elements.add(value, _valid(net, rows, value.shape, axes))
    ends = of_processes(np.array([elements.ends for elements in found]))
    lows, highs = ends[..., 0].min(axis=0), ends[..., 1].max(axis=0)
    for key, low, high in zip(wanted, lows, highs, strict=True):
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ReconstructionError(f"{key}: its float input holds NaN or infinity")
    histograms = _histograms(found, list(zip(lows.tolist(), highs.tolist(), strict=True)))
    quantizers = _search([bits for _, bits in wanted.values()], histograms)
    return dict(zip(wanted, quantizers, strict=True))


class _Elements:
    """The elements of a tensor that its histogram counts, and the ends of all of them.

    Of more than `MOST_ELEMENTS`, that many are drawn at random, the same ones in every run. Each of
    several processes has those on its own devices.

    Args:
      total: number of elements to come.
    """

    def __init__(self, total: int) -> None:
        self._share = min(1.0, MOST_ELEMENTS / max(total, 1))
        self._rng = np.random.default_rng(0)
        self._parts: list[np.ndarray] = [np.zeros(0, np.float32)]
        self.ends = (np.inf, -np.inf)

    def add(self, batch: Any, valid: np.ndarray | None) -> None:
        """Add those of a batch, of the elements that are `valid`; None stands for all."""
        drawn = self._draw(batch.shape, valid)
        for place, part in parts(batch):
            part = np.asarray(part, np.float32)
            values = part.ravel() if valid is None else part[valid[place]]
            if not values.size:
                continue
            low, high = self.ends
            # NaN passes through numpy's minimum and maximum.
            self.ends = (
                float(np.minimum(low, values.min())), float(np.maximum(high, values.max()))
            )  # fmt: skip
            if drawn is not None:
                values = part.ravel()[_within(drawn, batch.shape, place)]
            self._parts.append(values)

    def _draw(self, shape: tuple[int, ...], valid: np.ndarray | None) -> np.ndarray | None:
        """Positions in a flat batch, on all processes the same; None for all of them."""
        size = math.prod(shape) if valid is None else np.count_nonzero(valid)
        if self._share == 1.0 or not size:
            return None
        drawn = self._rng.integers(0, size, math.ceil(self._share * size))
        return drawn if valid is None else np.flatnonzero(valid)[drawn]

    def histogram(self, ends: tuple[float, float]) -> Histogram:
        """Of the elements so far, between the ends of all processes."""
        return make_histogram(np.concatenate(self._parts), ends)


def _valid(
    net: Network, rows: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...]
) -> np.ndarray | None:
    """Where a batch is not padding, in its shape; None for everywhere."""
    if net.valid_mask is None or not axes:
        return None
    return np.broadcast_to(valid_elements(net.valid_mask[rows], axes, len(shape)), shape)


def _within(positions: np.ndarray, shape: tuple[int, ...], place: tuple[slice, ...]) -> np.ndarray:
    """Those of the positions in a flat array that lie in a part of it, as positions in the flat
    part."""
    ends = [axis.indices(size)[:2] for axis, size in zip(place, shape, strict=True)]
    if all(stop - start == size for (start, stop), size in zip(ends, shape, strict=True)):
        return positions
    inside, found = np.ones(len(positions), bool), np.zeros(len(positions), np.int64)
    for index, (start, stop) in zip(np.unravel_index(positions, shape), ends, strict=True):
        inside &= (start <= index) & (index < stop)
        found = found * (stop - start) + index - start
    return found[inside]


def _histograms(
    found: Sequence[_Elements], ends: Sequence[tuple[float, float]]
) -> Iterable[Histogram]:
    """The histogram of each tensor, of the elements of all processes."""
    own = (elements.histogram(pair) for elements, pair in zip(found, ends, strict=True))
    if not several_processes():
        return own  # each is searched while the next is made
    own = list(own)
    bins = of_processes(np.stack([histogram.bins for histogram in own])).sum(axis=0)
    return [histogram._replace(bins=total) for histogram, total in zip(own, bins, strict=True)]


def _search(bits: Sequence[int], histograms: Iterable[Histogram]) -> list[ActivationQuantizer]:
    """The quantizer of each tensor, for its `bits`; those of a group are searched at once, each on
    a device of its own."""
    searched = [
        (numbers, search_histograms(group, width, split_rows))
        for width, numbers, group in _groups(bits, histograms)
    ]
    ranges: list[tuple[Any, Any]] = [(1.0, 0.0)] * len(bits)  # of tensors that are zero
    for numbers, found in searched:
        scales, zeros = map(read, found)  # of each device, perhaps more than there are tensors
        for row, number in enumerate(numbers):
            ranges[number] = scales[row], zeros[row]
    return [ActivationQuantizer(jnp.float32(scale), jnp.float32(zero)) for scale, zero in ranges]


def _groups(
    bits: Sequence[int], histograms: Iterable[Histogram]
) -> Iterator[tuple[int, list[int], list[Histogram]]]:
    """Bits, numbers and histograms of tensors that have the same candidates, at most as many as
    there are devices; none that is zero everywhere."""
    waiting: dict[Any, tuple[int, list[int], list[Histogram]]] = {}
    for number, (width, histogram) in enumerate(zip(bits, histograms, strict=True)):
        if not any(histogram.sides):
            continue
        alike = width, histogram.sides
        group = waiting.setdefault(alike, (width, [], []))
        group[1].append(number)
        group[2].append(histogram)
        if len(group[1]) == count():
            yield waiting.pop(alike)
    yield from waiting.values()
