"""Compiled operations for quantized convolutions; `aquant_jax` never imports them.

>>> backend()
Backend(name='gpu_ops')
"""

from gpu_ops.img2col import img2col, img2col_border
from gpu_ops.int8 import conv_border_int8
from gpu_ops.ops import Backend, backend, border_columns, border_conv
from gpu_ops.targets import export_checks
from gpu_ops.tuned import TunedConvolution, conv_border_tuned, fold_convolution

__all__ = [
    "Backend",
    "TunedConvolution",
    "backend",
    "border_columns",
    "border_conv",
    "conv_border_int8",
    "conv_border_tuned",
    "export_checks",
    "fold_convolution",
    "img2col",
    "img2col_border",
]
