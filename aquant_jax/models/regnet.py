"""RegNetX-600MF and RegNetX-3.2GF, in Flax linen.

References:
    Radosavovic et al., Designing Network Design Spaces (arXiv:2003.13678): Sec. 3.2 for the X
    block (bottleneck ratio 1, grouped 3x3 conv, no squeeze-and-excitation), Fig. 16 for the
    depths, widths and group widths.
"""

import flax.linen as nn
import jax

from aquant_jax.models.layers import conv_bn, pool_and_classify

STEM_CHANNELS = 32


class XBlock(nn.Module):
    """Residual 1x1, grouped 3x3, 1x1; a 1x1 conv on the shortcut where the shape changes."""

    channels: int
    stride: int
    group_width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, H / stride, W / stride, channels]."""
        groups = self.channels // self.group_width
        y = nn.relu(conv_bn(x, "conv1", self.channels))
        y = conv_bn(y, "conv2", self.channels, size=3, stride=self.stride, groups=groups)
        y = conv_bn(nn.relu(y), "conv3", self.channels)
        if self.stride != 1 or x.shape[-1] != self.channels:
            x = conv_bn(x, "shortcut", self.channels, stride=self.stride)
        return nn.relu(x + y)


class RegNetX(nn.Module):
    """3x3 stem, stages that begin with stride 2, head."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    group_width: int
    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps normalised images [N, H, W, 3] to logits [N, num_classes]."""
        x = nn.relu(conv_bn(x, "stem", STEM_CHANNELS, size=3, stride=2))
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            for index in range(depth):
                stride = 2 if index == 0 else 1
                name = f"stage{stage + 1}_{index}"
                x = XBlock(width, stride, self.group_width, name=name)(x)
        return pool_and_classify(x, self.num_classes)


def regnetx_600mf() -> RegNetX:
    """6,196,040 parameters."""
    return RegNetX(depths=(1, 3, 5, 7), widths=(48, 96, 240, 528), group_width=24)


def regnetx_3200mf() -> RegNetX:
    """15,296,552 parameters."""
    return RegNetX(depths=(2, 6, 15, 2), widths=(96, 192, 432, 1008), group_width=48)
