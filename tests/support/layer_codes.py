"""The integer codes of a layer's input, which the library never writes out."""

import jax.numpy as jnp

from aquant_jax.arithmetic.uniform import quantize, to_units
from aquant_jax.layers import im2col
from aquant_jax.layers.conv_geometry import ConvGeometry
from aquant_jax.layers.conv_layout import padded_input
from aquant_jax.layers.fake_quant import quantize_elements, rounding_of


def input_codes(op, spec, x, quantizer, border):
    """uint8 codes: like `x` where an element has one border, else ``[taps, N, *out, C]``."""
    if not spec.border:
        u = to_units(x, 1.0 / quantizer.step_size)
        return quantize(u, quantizer.zero_point, spec.act_bits).astype(jnp.uint8)
    if spec.border_granularity == "channel":
        values = quantize_elements(op, spec, x, quantizer, border)
        return (values / quantizer.step_size + quantizer.zero_point).round().astype(jnp.uint8)
    if op.layer.kind == "dense":
        padded, geometry = x[:, None, None], ConvGeometry.pointwise(1)
    else:
        padded, geometry = padded_input(op, x)
    codes = im2col.column_codes(padded, quantizer, border, geometry, rounding_of(spec))
    codes = jnp.stack(codes).astype(jnp.uint8)
    return codes.reshape(x.shape) if len(codes) == 1 else codes
