"""The best border of one product in closed form: Eq. 4 and Eq. 7 of the paper."""


def analytic_border(x, weight, weight_error, propagated_error=0.0):
    """``B = dw / (w + dw) * x' + w / (w + dw) * e(x') + 1/2``, in units of the step sizes.

    Args:
      x: the (noised) activation x'.
      weight: w.
      weight_error: dw, the quantized weight minus `weight`; ``weight + weight_error`` non-zero.
      propagated_error: ``e(x') = x' - x``.

    Returns:
      The border for ``ceil(x' - B)``. It leaves [0, 1] where the code that best compensates the
      error of the weight is more than one step away from x'.
    """
    quantized = weight + weight_error
    return weight_error / quantized * x + weight / quantized * propagated_error + 0.5
