"""How many weighted ops of a network are quantized, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from aquant_jax.graph.ir import Unquantized
from aquant_jax.layers.fake_quant import LayerSpec


def coverage(specs: Iterable[LayerSpec], unquantized: Sequence[Unquantized]) -> str:
    """One line: the number of quantized weighted ops, and the float ones, each with its reason.

    Args:
      specs: of the layers.
      unquantized: the ops that no layer stands for.
    """
    layers = list(specs)
    floats = [f"{spec.path} (override)" for spec in layers if spec.weight_bits is None]
    floats += [f"{op.path} ({op.primitive}: {op.reason})" for op in unquantized]
    total = len(layers) + len(unquantized)
    line = f"{total - len(floats)} of {total} weighted ops quantized"
    return f"{line}; float: {', '.join(floats)}" if floats else line
