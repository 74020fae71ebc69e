"""Compiled operations for quantized convolutions; `aquant_jax` never imports them.

>>> backend()
Backend(name='gpu_ops')
"""

from gpu_ops.ops import Backend, backend, border_columns

__all__ = ["Backend", "backend", "border_columns"]
