"""im2col columns of a convolution's input, quantized with rounding borders, as XLA custom calls.

`img2col_border` is what a deployed convolution reads: the border is evaluated and the element
quantized while the columns are gathered. `img2col` gathers alone, to compare with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gpu_ops import arguments, partition, targets
from gpu_ops.arguments import Padding

OUTPUTS = {"int8": jnp.int8, "float32": jnp.float32}


def img2col(
    x: jax.Array,
    *,
    kernel: Sequence[int],
    strides: Sequence[int] = (1, 1),
    padding: Padding,
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    align: int = 1,
) -> jax.Array:
    """im2col columns of `x` as they are: `img2col_border` without the quantization.

    Args:
      x: float32, bfloat16 or int8 ``[N, H, W, C]``.
      kernel, strides, padding, dilation, groups, align: see `img2col_border`.

    Returns:
      ``[N, OH, OW, groups, Kp]`` of the dtype of `x`; zero padding and the elements above K are 0.

    Raises:
      ValueError: see `img2col_border`.

    >>> x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    >>> img2col(x, kernel=(2, 2), padding="VALID", align=8)[0, 0, 0, 0]
    Array([0., 1., 2., 3., 0., 0., 0., 0.], dtype=float32)
    """
    arguments.check_x(x, ("float32", "bfloat16", "int8"))
    window = arguments.columns_window(x.shape, kernel, strides, padding, dilation, groups, align)
    return partition.compiled(_Plain(window, x.dtype))(x)


def img2col_border(
    x: jax.Array,
    step_size: ArrayLike,
    zero_point: ArrayLike = 0,
    coefficients: Mapping[str, jax.Array] | None = None,
    *,
    kernel: Sequence[int],
    strides: Sequence[int] = (1, 1),
    padding: Padding,
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    bits: int,
    border: str = "none",
    phi: str = "identity",
    fused: bool = True,
    output: str = "int8",
    align: int = 1,
) -> jax.Array:
    """im2col columns of `x`, each element quantized with its border (Eq. 5, 8, 9).

    The same numbers as `aquant_jax.layers.im2col.column_codes`, to the bit on CPU and CUDA, but for
    subnormal numbers, which count as zero here, as in what XLA compiles for the CPU. Where an
    element's u or border is not a number, its code is 0. Not differentiable:
    `gpu_ops.border_columns` is.

    Args:
      x: float32 or bfloat16 ``[N, H, W, C]``.
      step_size: positive number or float32 scalar; it stays on the device. One that is not
        positive and finite is a ValueError when it is known here and otherwise, on the CPU, an
        error when run; CUDA cannot wait for its value and gives code 0, and for float32
        not-a-number, everywhere.
      zero_point: the code of zero, in ``[0, 2^bits - 1]``; under jit on CUDA it is not checked.
      coefficients: float32 ``(taps, C)`` by name; None for border ``none``.
      kernel, strides, dilation: two integers each.
      padding: ``SAME``, ``VALID`` or ((low, high), (low, high)). A zero of the padding has a border
        and a code like any other element.
      groups: of the channels; group g has the channels ``[g * C / groups, (g + 1) * C / groups)``.
      bits: 2 to 8.
      border: ``none`` for rounding to nearest, ``ceil(u - 0.5)``, or a border function built into
        `aquant_jax.arithmetic.border`.
      phi: ``identity`` or ``clamp``.
      fused: whether the taps of a channel share their mean border.
      output: ``int8`` for codes q or ``float32`` for the values ``s * (q - z)``. Codes of 8 bits do
        not fit: they come as q - 128, so ``sum(w * q)`` over a column is
        ``sum(w * (q - 128)) + 128 * sum(w)``.
      align: K is rounded up to a multiple of it. The elements above K are 0, also with 8 bits,
        where 0 stands for the code 128: weights there must be 0.

    Returns:
      int8 or float32 ``[N, OH, OW, groups, Kp]``: a column is (tap, channel of the group) in
      row-major order, ``K = taps * C / groups``.

    Raises:
      ValueError: what does not fit, by name and with both values.

    >>> x = jnp.array([0.2, 0.4, 0.6, 0.8]).reshape(1, 1, 1, 4)
    >>> img2col_border(x, 0.5, kernel=(1, 1), padding="VALID", bits=4)[0, 0, 0, 0]
    Array([0, 1, 1, 2], dtype=int8)
    """
    arguments.check_x(x, ("float32", "bfloat16"))
    window = arguments.columns_window(x.shape, kernel, strides, padding, dilation, groups, align)
    if phi not in ("identity", "clamp"):
        raise ValueError(f"phi is {phi!r}, not 'identity' or 'clamp'; the jnp path serves others")
    if output not in OUTPUTS:
        raise ValueError(f"output is {output!r}, not one of {list(OUTPUTS)}")
    stacked = arguments.stack(
        coefficients or {}, border, (int(np.prod(window.kernel)), x.shape[-1])
    )
    step, zero = arguments.grid(step_size, zero_point, bits)
    call = _Quantized(window, bits, fused, targets.PHIS[phi], OUTPUTS[output])
    return partition.compiled(call)(x, step, zero, stacked)


class _Plain(NamedTuple):
    """A call of `img2col`: `x` is its operand."""

    window: arguments.ColumnsWindow
    dtype: np.dtype

    operands, results, images = "n h w c", "n a b g k", 1

    def __call__(self, x):
        shape = jax.ShapeDtypeStruct((x.shape[0], *self.window.result), self.dtype)
        return targets.call("img2col", shape, **self.window.attributes())(x)


class _Quantized(NamedTuple):
    """A call of `img2col_border`: `x`, step size, zero point and coefficients are its operands."""

    window: arguments.ColumnsWindow
    bits: int
    fused: bool
    phi: int
    dtype: type

    operands, results, images = "n h w c, , , d t e", "n a b g k", 1

    def __call__(self, x, *others):
        shape = jax.ShapeDtypeStruct((x.shape[0], *self.window.result), self.dtype)
        how = {"bits": self.bits, "fused": self.fused, "phi": self.phi}
        return targets.call("img2col_border", shape, **self.window.attributes(), **how)(x, *others)
