"""Building blocks of the networks of the zoo: conv with batch norm, and the head.

Every conv called ``NAME`` is followed by a batch norm called ``NAME_bn``; the tables of `layouts`
rely on it.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]


class ConvStyle(NamedTuple):
    """Settings that all conv layers of one network share.

    Attributes:
        epsilon: of the batch norm.
        same: pad as TensorFlow's "SAME" (at stride 2 the larger half is behind the image);
            otherwise pad by half the kernel on every side, as PyTorch networks do.
    """

    epsilon: float = 1e-5
    same: bool = False


TORCH_STYLE = ConvStyle()


def conv_bn(
    x: jax.Array,
    name: str,
    channels: int,
    size: int = 1,
    stride: int = 1,
    groups: int = 1,
    style: ConvStyle = TORCH_STYLE,
) -> jax.Array:
    """A conv without bias and its batch norm in inference mode; call it in a compact method.

    Args:
        x: [N, H, W, C].
        name: of the conv; the batch norm is ``NAME_bn``.
        channels: of the output.
        size: of the square kernel.
        stride: in both directions.
        groups: of channels.
        style: padding and epsilon.

    Returns:
        [N, ceil(H / stride), ceil(W / stride), channels].
    """
    x = nn.Conv(
        channels,
        (size, size),
        strides=(stride, stride),
        padding="SAME" if style.same else size // 2,
        feature_group_count=groups,
        use_bias=False,
        name=name,
    )(x)
    return nn.BatchNorm(use_running_average=True, epsilon=style.epsilon, name=f"{name}_bn")(x)


def pool_and_classify(x: jax.Array, num_classes: int, name: str = "head") -> jax.Array:
    """Global average pooling and a dense layer: [N, H, W, C] to logits [N, num_classes]."""
    return nn.Dense(num_classes, name=name)(jnp.mean(x, axis=(1, 2)))
