"""A small residual CNN for 8x8 grey digits, in Flax NNX.

The package contains its float checkpoint (``digits_cnn.safetensors``), which
``launch/train_digits.py`` trained.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions; a 1x1 convolution on the shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(
            inputs, outputs, (3, 3), strides=stride, padding=1, use_bias=False, rngs=rngs
        )
        self.bn1 = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(outputs, outputs, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)
        self.changes_shape = stride != 1 or inputs != outputs
        if self.changes_shape:
            self.shortcut = nnx.Conv(inputs, outputs, (1, 1), strides=stride, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [N, H, W, inputs] to [N, H / stride, W / stride, outputs]."""
        y = jax.nn.relu(self.bn1(self.conv1(x), use_running_average=not train))
        y = self.bn2(self.conv2(y), use_running_average=not train)
        return jax.nn.relu(y + (self.shortcut(x) if self.changes_shape else x))


class DigitsCNN(nnx.Module):
    """Stem, three residual blocks (the second halves the resolution), pooling, dense head."""

    def __init__(self, num_classes: int = 10, *, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(1, 16, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.stem_bn = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.block1 = ResidualBlock(16, 16, 1, rngs=rngs)
        self.block2 = ResidualBlock(16, 24, 2, rngs=rngs)
        self.block3 = ResidualBlock(24, 24, 1, rngs=rngs)
        self.head = nnx.Linear(24, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [N, 8, 8, 1] in [0, 1] to logits [N, num_classes]."""
        x = jax.nn.relu(self.stem_bn(self.stem(x), use_running_average=not train))
        for block in (self.block1, self.block2, self.block3):
            x = block(x, train)
        return self.head(jnp.mean(x, axis=(1, 2)))
