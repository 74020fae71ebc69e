"""Initial step sizes: the range search over activations of the float network."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import jax
import numpy as np

from aquant_jax.arithmetic.range_search import search_activation_range
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.errors import ReconstructionError
from aquant_jax.graph.subgraph import source_tensor
from aquant_jax.plan.block_program import BlockProgram, make_block_program, valid_elements
from aquant_jax.plan.network import Network

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
    parts: list[list[np.ndarray]] = [[] for _ in wanted]
    for rows, outputs in run_float(probe):
        for part, value, axes in zip(parts, outputs, probe.position_axes, strict=True):
            part.append(_valid_values(net, rows, value, axes))
    quantizers = {}
    for (key, (_, bits)), part in zip(wanted.items(), parts, strict=True):
        elements = np.concatenate(part)
        if not np.isfinite(elements).all():
            raise ReconstructionError(f"{key}: its float input holds NaN or infinity")
        quantizers[key] = search_activation_range(elements, bits)
    return quantizers


def _valid_values(
    net: Network, rows: np.ndarray, value: jax.Array, axes: tuple[int, ...]
) -> np.ndarray:
    """The elements of one batch that are not padding, flat float32."""
    values = np.asarray(value, np.float32)
    if net.valid_mask is not None and axes:
        valid = valid_elements(net.valid_mask[rows], axes, values.ndim)
        values = values[np.broadcast_to(valid, values.shape)]
    return values.ravel()
