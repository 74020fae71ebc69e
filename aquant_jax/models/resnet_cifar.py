"""ResNet-20/32/44/56 for 32x32 images, in Flax linen.

References:
    He et al., Deep Residual Learning for Image Recognition (arXiv:1512.03385), Sec. 4.2:
    three stages of n blocks with 16, 32 and 64 channels, parameter-free (option A)
    shortcuts, 6n + 2 weighted layers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from aquant_jax.models.layers import conv_bn, pool_and_classify

STAGE_CHANNELS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around an option-A shortcut."""

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, H / stride, W / stride, channels]."""
        y = nn.relu(conv_bn(x, "conv1", self.channels, size=3, stride=self.stride))
        return nn.relu(conv_bn(y, "conv2", self.channels, size=3) + self._shortcut(x))

    def _shortcut(self, x: jax.Array) -> jax.Array:
        if self.stride == 1 and x.shape[-1] == self.channels:
            return x
        x = x[:, :: self.stride, :: self.stride, :]
        extra = self.channels - x.shape[-1]
        # The public weights were trained with the new channels on both sides.
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))


class ResNetCifar(nn.Module):
    """The CIFAR ResNet of depth 6 * blocks_per_stage + 2."""

    blocks_per_stage: int = 3
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps normalised images [N, 32, 32, 3] to logits [N, num_classes]."""
        x = nn.relu(conv_bn(x, "conv1", STAGE_CHANNELS[0], size=3))
        for stage, channels in enumerate(STAGE_CHANNELS):
            for index in range(self.blocks_per_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                x = BasicBlock(channels, stride, name=f"layer{stage + 1}_{index}")(x)
        return pool_and_classify(x, self.num_classes, name="linear")


def resnet_cifar(depth: int) -> ResNetCifar:
    """The network of 20, 32, 44 or 56 weighted layers."""
    return ResNetCifar(blocks_per_stage=(depth - 2) // 6)
