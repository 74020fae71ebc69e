"""im2col columns of a convolution with rounding borders for training, as an XLA custom call."""

from __future__ import annotations

import jax

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.border import Coefficients
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.conv_geometry import ConvGeometry
from gpu_ops.training import differentiable, prepare


def border_columns(
    x: AnyArray,
    keep: AnyArray | None,
    quantizer: ActivationQuantizer,
    coefficients: Coefficients,
    geometry: ConvGeometry,
    rounding: Rounding,
) -> jax.Array:
    """Dequantized im2col columns, each element rounded with its border (Eq. 5, 8, 9).

    Differentiable in `x`, the step size and the coefficients, straight through the ceil.

    Args:
      x: float32 ``[N, *padded, C]``, one or two spatial axes, already padded.
      keep: None, or bool of the shape of `x`: False leaves the element unquantized (QDrop).
      quantizer: step size and zero point.
      coefficients: ``(taps, C)`` by name.
      geometry: over the padded input; columns do not depend on its groups.
      rounding: bits and a built-in border.

    Returns:
      float32 ``[N, *out, taps, C]``.

    Raises:
      ValueError: a border or phi without a custom call; shapes or dtypes that do not fit; a step
        size that is not positive, or a zero point outside the codes, where they are known.
      JaxRuntimeError (or ValueError, as JAX has it): at run time on a CPU, a step size that is not
        positive. Not-a-number gives columns of not-a-number. CUDA cannot wait for the value: a step
        size that is not positive gives not-a-number there, too.
    """
    call, operands = prepare(x, keep, quantizer, coefficients, geometry, rounding)
    columns = differentiable(call, *operands)
    return columns.reshape(x.shape[0], *geometry.out, *columns.shape[-2:])
