"""EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excitation, with ReLU6.

References:
    Tan and Le, EfficientNet (arXiv:1905.11946), Table 1; the Lite variant is TensorFlow's
    ``tpu/models/official/efficientnet/lite``, whose weights need its "SAME" padding and
    epsilon. Images are scaled by (x - 127) / 128.
"""

from aquant_jax.models.layers import ConvStyle
from aquant_jax.models.mobile import MobileNet, Stage

STAGES = (
    Stage(expansion=1, channels=16, depth=1, stride=1),
    Stage(expansion=6, channels=24, depth=2, stride=2),
    Stage(expansion=6, channels=40, depth=2, stride=2, size=5),
    Stage(expansion=6, channels=80, depth=3, stride=2),
    Stage(expansion=6, channels=112, depth=3, stride=1, size=5),
    Stage(expansion=6, channels=192, depth=4, stride=2, size=5),
    Stage(expansion=6, channels=320, depth=1, stride=1),
)


def efficientnet_lite0() -> MobileNet:
    """4,652,008 parameters."""
    return MobileNet(STAGES, style=ConvStyle(epsilon=1e-3, same=True))
