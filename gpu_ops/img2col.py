"""im2col columns of a convolution's input, unquantized, as an XLA custom call."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.layers.conv_geometry import ConvGeometry
from gpu_ops import arguments, partition, targets
from gpu_ops.geometry import check_geometry, columns_shape


def img2col(x: AnyArray, geometry: ConvGeometry, align: int = 1) -> jax.Array:
    """im2col columns of `x`: `img2col_border` without the quantization, for comparison.

    Args:
      x: float32, bfloat16 or int8 ``[N, H, W, C]``.
      geometry: of the convolution; see `gpu_ops.conv_geometry`.
      align: see `img2col_border`.

    Returns:
      ``[N, OH, OW, groups, Kp]`` of the dtype of `x`; zero padding and the elements above K are 0.

    Raises:
      ValueError: see `img2col_border`.

    >>> import jax
    >>> from gpu_ops import conv_geometry, img2col
    >>> x = jax.numpy.arange(4.0).reshape(1, 2, 2, 1)
    >>> img2col(x, conv_geometry(x.shape, (2, 2), padding="VALID"), align=8)[0, 0, 0, 0]
    Array([0., 1., 2., 3., 0., 0., 0., 0.], dtype=float32)
    """
    arguments.check_x(x, ("float32", "bfloat16", "int8"))
    geometry = check_geometry(geometry, x.shape)
    columns = columns_shape(geometry, x.shape[-1], align)
    return partition.compiled(_Img2colCall(geometry, columns, x.dtype))(x)


class _Img2colCall(NamedTuple):
    """A call of `img2col` on x.

    Attributes:
      geometry: of the convolution.
      columns: shape of one image's columns.
      dtype: of x.
    """

    geometry: ConvGeometry
    columns: tuple[int, ...]
    dtype: np.dtype

    operands, results, images = "n h w c", "n a b g k", 1

    def __call__(self, x: AnyArray) -> jax.Array:
        result = jax.ShapeDtypeStruct((x.shape[0], *self.columns), self.dtype)
        return targets.call("img2col", result, **targets.geometry_attributes(self.geometry))(x)
