"""im2col columns of a convolution's input, quantized with rounding borders, as an XLA custom call.

A deployed convolution reads them: the border is evaluated and the element quantized while the
columns are gathered. The codes are those of `aquant_jax.layers.im2col.column_codes`, to the bit on
CPU and CUDA, but for subnormal numbers, which count as zero here, as in XLA's code for the CPU.
Where u or the border of an element is not a number, its code is 0. Codes of 8 bits do not fit in
int8 and are stored as q - 128: ``sum(w * q)`` over a column is
``sum(w * (q - 128)) + 128 * sum(w)``. The elements that `align` adds to a column are 0 with 8 bits
too, where 0 stands for the code 128: weights there must be 0.

A step size that is not positive and finite is a ValueError when it is known here. Otherwise it is
an error at run time on the CPU. CUDA cannot wait for its value: every code is then 0, and every
float32 value not a number. Under jit, CUDA does not check the zero point.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.border import Coefficients
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.conv_geometry import ConvGeometry
from gpu_ops import partition, targets
from gpu_ops.arguments import check_quantizer, check_x, stack_coefficients
from gpu_ops.geometry import check_geometry, columns_shape

OUTPUTS = {"int8": jnp.int8, "float32": jnp.float32}


def img2col_border(
    x: AnyArray,
    quantizer: ActivationQuantizer,
    coefficients: Coefficients,
    rounding: Rounding,
    geometry: ConvGeometry,
    *,
    output: str = "int8",
    align: int = 1,
) -> jax.Array:
    """im2col columns of `x`, each element quantized with its border (Eq. 5, 8, 9).

    Args:
      x: float32 or bfloat16 ``[N, H, W, C]``.
      quantizer: step size and zero point; they stay on the device.
      coefficients: float32 ``(taps, C)`` by name; empty for nearest.
      rounding: bits, a built-in border or None, and a phi of ``identity`` or ``clamp``.
      geometry: see `gpu_ops.conv_geometry`.
      output: ``int8`` for codes q, or ``float32`` for the values ``s * (q - z)``.
      align: K is rounded up to a multiple of it. The elements above K are 0, also with 8 bits.

    Returns:
      ``[N, OH, OW, groups, Kp]``; a column is (tap, channel of the group); K is taps * C / groups.

    Raises:
      ValueError: an argument that does not fit, by name and with both values.

    >>> import jax.numpy as jnp
    >>> from aquant_jax.arithmetic.uniform import ActivationQuantizer
    >>> from aquant_jax.layers.column import Rounding
    >>> from gpu_ops import conv_geometry, img2col_border
    >>> x = jnp.array([[[[0.2, 0.4, 0.6, 0.8]]]])
    >>> quantizer = ActivationQuantizer(jnp.float32(0.5), jnp.float32(0))
    >>> geometry = conv_geometry(x.shape, (1, 1), padding="VALID")
    >>> img2col_border(x, quantizer, {}, Rounding(4), geometry)[0, 0, 0, 0]
    Array([0, 1, 1, 2], dtype=int8)
    """
    check_x(x, ("float32", "bfloat16"))
    geometry = check_geometry(geometry, x.shape)
    columns = columns_shape(geometry, x.shape[-1], align)
    _check_options(rounding, output)
    stacked = stack_coefficients(coefficients, rounding.border, (geometry.taps, x.shape[-1]))
    step_size, zero_point = check_quantizer(quantizer, rounding.bits)
    call = _Img2colBorderCall(geometry, rounding, columns, OUTPUTS[output])
    return partition.compiled(call)(x, step_size, zero_point, stacked)


def _check_options(rounding: Rounding, output: str) -> None:
    """ValueError unless the kernel has this phi and output."""
    if rounding.phi not in ("identity", "clamp"):
        raise ValueError(
            f"phi is {rounding.phi!r}, not 'identity' or 'clamp'; "
            "aquant_jax.layers.backend.ReferenceBackend serves others"
        )
    if output not in OUTPUTS:
        raise ValueError(f"output is {output!r}, not one of {list(OUTPUTS)}")


class _Img2colBorderCall(NamedTuple):
    """A call of `img2col_border` on x, step size, zero point and coefficients.

    Attributes:
      geometry: of the convolution.
      rounding: bits and border.
      columns: shape of one image's columns.
      dtype: of the columns.
    """

    geometry: ConvGeometry
    rounding: Rounding
    columns: tuple[int, ...]
    dtype: Any

    operands, results, images = "n h w c, , , d t e", "n a b g k", 1

    def __call__(self, x: AnyArray, *others: jax.Array) -> jax.Array:
        result = jax.ShapeDtypeStruct((x.shape[0], *self.columns), self.dtype)
        attributes = targets.geometry_attributes(self.geometry)
        attributes |= targets.rounding_attributes(self.rounding)
        return targets.call("img2col_border", result, **attributes)(x, *others)
