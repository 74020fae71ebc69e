"""ResNet-20/32/44/56 for 32x32 images, in Flax linen.

References:
    He et al., Deep Residual Learning for Image Recognition (arXiv:1512.03385), Sec. 4.2:
    three stages of n blocks with 16, 32 and 64 channels, parameter-free (option A)
    shortcuts, 6n + 2 weighted layers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

STAGE_CHANNELS = (16, 32, 64)
BATCH_NORM_EPSILON = 1e-5


def _conv3x3(channels: int, stride: int, name: str) -> nn.Conv:
    return nn.Conv(channels, (3, 3), strides=(stride, stride), padding=1, use_bias=False, name=name)


def _batch_norm(train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=BATCH_NORM_EPSILON, name=name
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around an option-A shortcut."""

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [N, H, W, C] to [N, H / stride, W / stride, channels]."""
        y = _conv3x3(self.channels, self.stride, "conv1")(x)
        y = nn.relu(_batch_norm(train, "bn1")(y))
        y = _conv3x3(self.channels, 1, "conv2")(y)
        y = _batch_norm(train, "bn2")(y)
        return nn.relu(y + self._shortcut(x))

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
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps normalised images [N, 32, 32, 3] to logits [N, num_classes]."""
        x = _conv3x3(STAGE_CHANNELS[0], 1, "conv1")(x)
        x = nn.relu(_batch_norm(train, "bn1")(x))
        for stage, channels in enumerate(STAGE_CHANNELS):
            for index in range(self.blocks_per_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                block = BasicBlock(channels, stride, name=f"layer{stage + 1}_{index}")
                x = block(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, name="linear")(x)
