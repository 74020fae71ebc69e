"""What the library computes, in plain numpy from docs/explanation/method.md, without importing it.

Everything runs in the dtype of its arguments: float32 for codes, float64 for finite differences.
"""

import numpy as np

BELOW_ONE = 1.0 - 2.0**-24


def nearest(u):
    return np.ceil(u - 0.5)


def polynomial(coefficients, u):
    """b0 + b1 u + b2 u^2 in Horner order; absent powers are zero."""
    b0, b1, b2 = coefficients.get("b0"), coefficients.get("b1"), coefficients.get("b2")
    if b2 is not None:
        return (b2 * u + b1) * u + b0
    if b1 is not None:
        return b1 * u + b0
    return b0 + 0 * u


def phi(name, p):
    if name == "clamp":
        return np.clip(p, 0.0, BELOW_ONE)
    if name == "sigmoid":
        return 1.0 / (1.0 + np.exp(-p))
    assert name == "identity"
    return p


def column_borders(columns, coefficients, phi_name, shared_across_taps):
    """Borders of u-columns [..., taps, C], coefficients [taps, C], or their mean."""
    p = polynomial(coefficients, columns)
    if shared_across_taps:
        total = p[..., 0, :]
        for tap in range(1, p.shape[-2]):
            total = total + p[..., tap, :]
        mean = total * p.dtype.type(np.float32(1.0 / p.shape[-2]))
        p = np.repeat(mean[..., None, :], p.shape[-2], axis=-2)
    return phi(phi_name, p).astype(columns.dtype)


def im2col(
    x, kernel, strides=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1), lhs_dilation=(1, 1)
):
    """[N, H, W, C] -> [N, OH, OW, taps, C], taps in row-major order.

    Zeros are inserted into `x` by `lhs_dilation`; then it is padded, or cropped where `padding` is
    negative.
    """
    n, height, width, channels = x.shape
    down, right = lhs_dilation
    inserted = np.zeros((n, (height - 1) * down + 1, (width - 1) * right + 1, channels), x.dtype)
    inserted[:, ::down, ::right] = x
    (top, bottom), (left, right) = padding
    padded = np.pad(
        inserted, ((0, 0), *((max(low, 0), max(high, 0)) for low, high in padding), (0, 0))
    )
    x = padded[:, max(-top, 0) : padded.shape[1] + min(bottom, 0)]
    x = x[:, :, max(-left, 0) : x.shape[2] + min(right, 0)]
    (kh, kw), (sh, sw), (dh, dw) = kernel, strides, dilation
    out_h = (x.shape[1] - (kh - 1) * dh - 1) // sh + 1
    out_w = (x.shape[2] - (kw - 1) * dw - 1) // sw + 1
    taps = []
    for i in range(kh):
        for j in range(kw):
            rows = [i * dh + sh * r for r in range(out_h)]
            cols = [j * dw + sw * c for c in range(out_w)]
            taps.append(x[:, rows][:, :, cols])
    return np.stack(taps, axis=3)


def product(columns, kernel, groups=1):
    """Columns [N, OH, OW, taps, C] times an HWIO kernel with `groups` feature groups."""
    height, width, inner, outputs = kernel.shape
    flat = kernel.reshape(height * width, inner, outputs)
    parts = []
    for g in range(groups):
        own = columns[..., g * inner : (g + 1) * inner]
        weights = flat[..., g * (outputs // groups) : (g + 1) * (outputs // groups)]
        parts.append(np.einsum("nhwtc,tco->nhwo", own, weights))
    return np.concatenate(parts, axis=-1)


class Frozen:
    """A quantizer whose rounding residual and clip masks stay as they were at the first call.

    That is the function whose derivative the straight-through estimator takes, so finite
    differences of it are the gradients to expect.
    """

    def __init__(self):
        self.saved = None

    def codes(self, v, zero, bits):
        top = 2**bits - 1
        if self.saved is None:
            rounded = np.ceil(v)
            raw = rounded + zero
            self.saved = rounded - v, raw < 0, raw > top
        residual, below, above = self.saved
        return np.where(below, 0.0, np.where(above, top, v + residual + zero))


class Live:
    """The quantizer itself."""

    @staticmethod
    def codes(v, zero, bits):
        return np.clip(np.ceil(v) + zero, 0, 2**bits - 1)


def quantize_activation(x, step, zero, bits, border=0.5, quantizer=Live):
    """Fake-quantized x."""
    inverse = x.dtype.type(1.0) / x.dtype.type(step)
    return step * (quantizer.codes(x * inverse - border, zero, bits) - zero)


def quantized_conv(
    x, weight, bias, step, zero, bits, coefficients=None, phi_name="clamp", granularity="mean",
    strides=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1), groups=1, keep=None, quantizer=Live,
    lhs_dilation=(1, 1),
):  # fmt: skip
    """A convolution of fake-quantized columns; `weight` holds real values. Also the codes.

    With one border a channel, padding and the zeros of `lhs_dilation` are added to what is
    quantized: they have the code of zero.
    """
    geometry = weight.shape[:2], strides, padding, dilation, lhs_dilation
    columns = im2col(x, *geometry)
    inverse = x.dtype.type(1.0) / x.dtype.type(step)
    u = columns * inverse
    border = x.dtype.type(0.5)
    if coefficients is not None:
        border = column_borders(u, coefficients, phi_name, granularity == "mean")
    codes = quantizer.codes(u - border, zero, bits)
    if granularity == "channel":
        inside = im2col(np.ones(x.shape, bool), *geometry)
        codes = np.where(inside, codes, zero).astype(codes.dtype)
    values = step * (codes - zero)
    if keep is not None:
        # Padding is no element of the tensor: nothing drops its quantizer.
        dropped = im2col(~keep, *geometry)
        values = np.where(dropped, columns, values)
    return product(values, weight, groups) + bias, codes


def soft_weight(weight, scale, zero, bits, alpha):
    """AdaRound's soft weights; scale and zero point broadcast against `weight`."""
    h = np.clip(1.2 / (1.0 + np.exp(-alpha)) - 0.1, 0.0, 1.0)
    return scale * (np.clip(np.floor(weight / scale) + h + zero, 0, 2**bits - 1) - zero)


def hard_weight(weight, scale, zero, bits, alpha):
    return scale * (np.clip(np.floor(weight / scale) + (alpha > 0) + zero, 0, 2**bits - 1) - zero)


def nearest_weight(weight, scale, zero, bits):
    return scale * (np.clip(nearest(weight / scale) + zero, 0, 2**bits - 1) - zero)


def relu(x):
    return np.maximum(x, 0.0)


def residual_block(x, weights, biases, grids, bits, coefficients, granularity, quantizers):
    """relu(conv2(relu(conv1(x))) + x), 3x3 convs of stride 1; the skip sees x rounded to nearest.

    Args:
      weights, biases: real values of the two convolutions.
      grids: ((step, zero), (step, zero)) of x and of the inner activation.
      coefficients: of the two borders.
      quantizers: three of `Live` or `Frozen`: first conv, second conv, skip.
    """
    options = {"granularity": granularity, "padding": ((1, 1), (1, 1))}
    y, _ = quantized_conv(
        x,
        weights[0],
        biases[0],
        *grids[0],
        bits,
        coefficients[0],
        quantizer=quantizers[0],
        **options,
    )
    y, _ = quantized_conv(
        relu(y), weights[1], biases[1], *grids[1], bits, coefficients[1], quantizer=quantizers[1],
        **options,
    )  # fmt: skip
    skip = quantize_activation(x, *grids[0], bits, quantizer=quantizers[2])
    return relu(y + skip)


def numerical_gradient(function, value, epsilon=1e-5):
    """Central differences of a scalar `function` of a float64 array."""
    value = np.array(value, np.float64)
    gradient = np.zeros_like(value)
    for place in np.ndindex(value.shape):
        kept = value[place]
        value[place] = kept + epsilon
        high = function(value)
        value[place] = kept - epsilon
        gradient[place] = (high - function(value)) / (2 * epsilon)
        value[place] = kept
    return gradient
