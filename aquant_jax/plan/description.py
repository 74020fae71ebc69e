"""A prepared network in words: its blocks, and what a user should know about it."""

from __future__ import annotations

from typing import Any

import jax

from aquant_jax import terminal
from aquant_jax.errors import check_type
from aquant_jax.graph.ir import path_names
from aquant_jax.graph.partition import Block
from aquant_jax.plan import checks
from aquant_jax.plan.channel_transform import kind
from aquant_jax.plan.coverage import coverage
from aquant_jax.plan.network import Network


class Description(str):
    """The text that `describe` returns, which rich prints as a table.

    Attributes:
      blocks: each with the sizes of what it takes, where these are several.
      notes: the lines behind them.
    """

    blocks: list[tuple[Block, str]]
    notes: list[str]

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        rows = [
            [str(index), block.name, "\n".join(block.layers), takes]
            for index, (block, takes) in enumerate(self.blocks)
        ]
        columns = {"": "right", "block": "left", "layers": "left"}
        if any(takes for _, takes in self.blocks):
            columns["input"] = "left"
        rows = [row[: len(columns)] for row in rows]
        table = terminal.table(f"{len(rows)} blocks", columns, rows)
        return Group(table, *map(Text, self.notes))


def describe(net: Network) -> Description:
    """A text: the blocks, the transformed activations, those that the rules add, the peak of cached
    memory, and the weighted ops that stay float. ``rich.print`` shows a table.

    >>> import numpy as np
    >>> import aquant_jax as aq
    >>> apply = lambda variables, x: x @ variables["head"]["kernel"]
    >>> variables = {"head": {"kernel": np.ones((4, 3), np.float32)}}
    >>> net = aq.prepare(apply, variables, np.ones((64, 4), np.float32), aq.recipes.aquant())
    >>> print(aq.describe(net))
    1 blocks:
      0  head: head/kernel
    cached activations: 0.0 MiB at the peak
    1 of 1 weighted ops quantized
    """
    check_type("net", net, Network, "what aq.prepare returns; aq.summary takes a quantized network")
    lines, blocks = [f"{len(net.blocks)} blocks:"], []
    for index, block in enumerate(net.blocks):
        size = checks.boundary_bytes(net.graph, block.start, net.samples) / 2**20
        count = len(block.start)
        takes = f"takes {count} activations, {size:.1f} MiB" if count > 1 else ""
        blocks.append((block, takes))
        lines.append(f"{index:3d}  {block}{f' ({takes})' if takes else ''}")
    notes = _notes(net)
    description = Description("\n".join([*lines, *notes]))
    description.blocks, description.notes = blocks, notes
    return description


def _notes(net: Network) -> list[str]:
    lines = []
    if net.transforms:
        lines.append(f"{len(net.transforms)} activations transformed before they are rounded:")
        lines += [f"     {key}: {kind(transform)}" for key, transform in net.transforms.items()]
    added = [tensor for tensor in net.plan.tensors.values() if tensor.key not in net.plan.layers]
    if added:
        lines.append(f"{len(added)} activations rounded to nearest besides the inputs of layers:")
        lines += [f"     {tensor.key}: {tensor.bits} bits" for tensor in added]
    outputs = path_names(jax.tree.unflatten(net.graph.tree, range(len(net.graph.outputs))))
    rest = [name or "output" for i, name in enumerate(outputs) if i not in net.targets]
    if rest:
        lines.append(f"outputs without samples, which are no target: {', '.join(rest)}")
    peak = checks.cache_bytes(net.graph, net.blocks, net.samples) / 2**20
    lines.append(f"cached activations: {peak:.1f} MiB at the peak")
    lines.append(coverage(net.plan.layers.values(), net.graph.unquantized))
    return lines
