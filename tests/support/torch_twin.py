"""The qdrop step of one residual block in PyTorch, written from the papers, not from our code.

AdaRound (Nagel et al. 2020), LSQ (Esser et al. 2020) and QDrop (Wei et al. 2022). It takes initial
state, batches and random masks from outside and returns the loss of every step.
"""

import math

import pytest

torch = pytest.importorskip("torch", reason="the twin is PyTorch (pip install -e '.[torch]')")
functional = torch.nn.functional


class Round(torch.autograd.Function):
    """Nearest with ties down, ``ceil(u - 1/2)``, and the straight-through gradient."""

    @staticmethod
    def forward(ctx, u):
        return torch.ceil(u - 0.5)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def scaled(parameter, factor):
    """The parameter, its gradient multiplied by `factor`."""
    return (parameter - parameter * factor).detach() + parameter * factor


def quantize_activation(x, step, bits, mask):
    """Fake-quantize an unsigned activation with zero point 0; where the mask is off, keep x."""
    top = 2**bits - 1
    step = scaled(step, 1.0 / math.sqrt(x.numel() * top))
    raw = Round.apply(x / step)
    codes = torch.where(raw < 0, torch.zeros_like(raw), torch.where(raw > top, top + 0 * raw, raw))
    return torch.where(mask, codes * step, x)


def soft_rounding(alpha):
    return torch.clamp(torch.sigmoid(alpha) * 1.2 - 0.1, 0.0, 1.0)


def soft_weight(weight, scale, zero, bits, alpha):
    """Weights [out, in, h, w], scale and zero point [out, 1, 1, 1]."""
    codes = torch.floor(weight / scale) + soft_rounding(alpha) + zero
    return scale * (torch.clamp(codes, 0, 2**bits - 1) - zero)


def block_output(x, layers, alphas, steps, masks, bits):
    """relu(conv2(relu(conv1(x))) + x) on quantized tensors; the skip sees the quantized input."""
    weights = [
        soft_weight(layer["weight"], layer["scale"], layer["zero"], layer["bits"], alpha)
        for layer, alpha in zip(layers, alphas, strict=True)
    ]
    x = quantize_activation(x, steps[0], bits[0], masks[0])
    y = functional.relu(functional.conv2d(x, weights[0], layers[0]["bias"], padding=1))
    y = quantize_activation(y, steps[1], bits[1], masks[1])
    y = functional.conv2d(y, weights[1], layers[1]["bias"], padding=1)
    return functional.relu(y + x)


def rounding_loss(alphas, progress, options):
    if progress < options["rounding_warmup"]:
        return torch.zeros(())
    fraction = (progress - options["rounding_warmup"]) / (1 - options["rounding_warmup"])
    beta = options["beta_start"] + (options["beta_end"] - options["beta_start"]) * fraction
    total = sum((1 - (2 * soft_rounding(a) - 1).abs() ** beta).sum() for a in alphas)
    return options["rounding_weight"] * total


def train(layers, alphas, steps, bits, batches, options):
    """Reconstruction losses of all steps, and the final alphas and step sizes.

    Args:
      layers: dicts of weight, bias, scale, zero, bits: torch tensors in OIHW.
      alphas, steps: initial values, numpy.
      bits: of the two activation tensors.
      batches: for every step (input, target, masks of the two tensors), NCHW torch tensors; the
        input is already mixed.
      options: learning rates and the rounding loss's schedule, by name.
    """
    alphas = [torch.tensor(a, requires_grad=True) for a in alphas]
    steps = [torch.tensor(s, requires_grad=True) for s in steps]
    optimizers = [
        torch.optim.Adam(alphas, lr=options["weight_lr"]),
        torch.optim.Adam(steps, lr=options["step_lr"]),
    ]
    cosine = lambda step: 0.5 * (1 + math.cos(math.pi * step / len(batches)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizers[1], cosine)
    losses = []
    for index, (x, target, masks) in enumerate(batches):
        output = block_output(x, layers, alphas, steps, masks, bits)
        loss = ((output - target) ** 2).sum(1).mean()
        total = loss + rounding_loss(alphas, index / len(batches), options)
        for optimizer in optimizers:
            optimizer.zero_grad()
        total.backward()
        for optimizer in optimizers:
            optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, [a.detach().numpy() for a in alphas], [s.item() for s in steps]
