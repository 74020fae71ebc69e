"""Networks of inverted residual blocks: MobileNetV2, MNASNet and EfficientNet-Lite.

References:
    Sandler et al., MobileNetV2 (arXiv:1801.04381), Fig. 3 and Table 1.
"""

from typing import NamedTuple

import flax.linen as nn
import jax

from aquant_jax.models.layers import (
    TORCH_STYLE,
    Activation,
    ConvStyle,
    conv_bn,
    pool_and_classify,
)


class Stage(NamedTuple):
    """Blocks of one shape; the stride is the first one's."""

    expansion: int
    channels: int
    depth: int
    stride: int
    size: int = 3


class InvertedResidual(nn.Module):
    """1x1 expansion (none at ratio 1), depthwise conv, linear 1x1 projection, and a shortcut
    where the shape stays."""

    expansion: int
    channels: int
    stride: int
    size: int
    activation: Activation
    style: ConvStyle

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, H / stride, W / stride, channels]."""
        wide, style = x.shape[-1] * self.expansion, self.style
        y = x
        if self.expansion != 1:
            y = self.activation(conv_bn(y, "expand", wide, style=style))
        y = conv_bn(y, "depthwise", wide, self.size, self.stride, groups=wide, style=style)
        y = conv_bn(self.activation(y), "project", self.channels, style=style)
        return x + y if self.stride == 1 and x.shape[-1] == self.channels else y


class MobileNet(nn.Module):
    """3x3 stem, inverted residual blocks, 1x1 conv to `last_channels`, head.

    Attributes:
        separable: channels of a separable conv after the stem (MNASNet); None for none.
    """

    stages: tuple[Stage, ...]
    stem_channels: int = 32
    last_channels: int = 1280
    separable: int | None = None
    activation: Activation = nn.relu6
    style: ConvStyle = TORCH_STYLE
    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps normalised images [N, H, W, 3] to logits [N, num_classes]."""
        activation, style, stem = self.activation, self.style, self.stem_channels
        x = activation(conv_bn(x, "stem", stem, size=3, stride=2, style=style))
        if self.separable is not None:
            x = activation(conv_bn(x, "depthwise", stem, size=3, groups=stem, style=style))
            x = conv_bn(x, "pointwise", self.separable, style=style)
        for number, stage in enumerate(self.stages):
            for index in range(stage.depth):
                x = InvertedResidual(
                    stage.expansion,
                    stage.channels,
                    stage.stride if index == 0 else 1,
                    stage.size,
                    activation,
                    style,
                    name=f"stage{number + 1}_{index}",
                )(x)
        x = activation(conv_bn(x, "last", self.last_channels, style=style))
        return pool_and_classify(x, self.num_classes)
