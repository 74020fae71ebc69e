"""ResNet-18 and ResNet-50 for ImageNet, in Flax linen.

References:
    He et al., Deep Residual Learning for Image Recognition (arXiv:1512.03385), Table 1, with
    the stride of a bottleneck in its 3x3 conv, as in all public PyTorch weights.
"""

from typing import Any

import flax.linen as nn
import jax

from aquant_jax.models.layers import conv_bn, pool_and_classify

STAGE_CHANNELS = (64, 128, 256, 512)
BOTTLENECK_EXPANSION = 4


class ResidualBlock(nn.Module):
    """Two 3x3 convs, or a bottleneck of 1x1, 3x3 and 1x1; a 1x1 conv where the shape changes."""

    channels: int
    stride: int = 1
    bottleneck: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, H / stride, W / stride, channels (* 4 in a bottleneck)]."""
        outputs = self.channels * (BOTTLENECK_EXPANSION if self.bottleneck else 1)
        if self.bottleneck:
            y = nn.relu(conv_bn(x, "conv1", self.channels))
            y = nn.relu(conv_bn(y, "conv2", self.channels, size=3, stride=self.stride))
            y = conv_bn(y, "conv3", outputs)
        else:
            y = nn.relu(conv_bn(x, "conv1", self.channels, size=3, stride=self.stride))
            y = conv_bn(y, "conv2", outputs, size=3)
        if self.stride != 1 or x.shape[-1] != outputs:
            x = conv_bn(x, "shortcut", outputs, stride=self.stride)
        return nn.relu(y + x)


class ResNet(nn.Module):
    """7x7 stem, max pooling, four stages of residual blocks, head."""

    depths: tuple[int, ...]
    bottleneck: bool
    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps normalised images [N, H, W, 3] to logits [N, num_classes]."""
        x = nn.relu(conv_bn(x, "stem", STAGE_CHANNELS[0], size=7, stride=2))
        padding: Any = ((1, 1), (1, 1))  # flax takes it, though annotated as a str
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=padding)
        for stage, (channels, depth) in enumerate(zip(STAGE_CHANNELS, self.depths, strict=True)):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"stage{stage + 1}_{index}"
                x = ResidualBlock(channels, stride, self.bottleneck, name=name)(x)
        return pool_and_classify(x, self.num_classes)


def resnet18() -> ResNet:
    """11,689,512 parameters."""
    return ResNet(depths=(2, 2, 2, 2), bottleneck=False)


def resnet50() -> ResNet:
    """25,557,032 parameters."""
    return ResNet(depths=(3, 4, 6, 3), bottleneck=True)
