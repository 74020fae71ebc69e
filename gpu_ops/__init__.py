"""Compiled operations for quantized convolutions; `aquant_jax` never imports them.

>>> backend()
CustomCallBackend(name='gpu_ops', one_pass_weights=131072)
"""

from aquant_jax.layers.epilogue import Codes, Epilogue, Requantization, Results
from gpu_ops.backend import CustomCallBackend, backend
from gpu_ops.border_columns import border_columns
from gpu_ops.border_conv import border_conv
from gpu_ops.conv_border_int8 import conv_border_int8
from gpu_ops.conv_border_tuned import TunedConvolution, conv_border_tuned, fold_convolution
from gpu_ops.geometry import conv_geometry
from gpu_ops.img2col import img2col
from gpu_ops.img2col_border import img2col_border
from gpu_ops.targets import export_checks

__all__ = [
    "Codes",
    "CustomCallBackend",
    "Epilogue",
    "Requantization",
    "Results",
    "TunedConvolution",
    "backend",
    "border_columns",
    "border_conv",
    "conv_border_int8",
    "conv_border_tuned",
    "conv_geometry",
    "export_checks",
    "fold_convolution",
    "img2col",
    "img2col_border",
]
