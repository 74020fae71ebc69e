"""EfficientNet-Lite: EfficientNet without squeeze-and-excitation, with ReLU6.

References:
    Tan and Le, EfficientNet (arXiv:1905.11946), Section 3.3 and Table 1; the Lite variant is
    TensorFlow's ``tpu/models/official/efficientnet/lite``, whose weights need its "SAME" padding
    and epsilon. Images are scaled by (x - 127) / 128.
"""

import math

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
    """4,652,008 parameters, images of 224 x 224."""
    return _scaled(width=1.0, depth=1.0)


def efficientnet_lite1() -> MobileNet:
    """5,416,680 parameters, images of 240 x 240."""
    return _scaled(width=1.0, depth=1.1)


def efficientnet_lite2() -> MobileNet:
    """6,092,072 parameters, images of 260 x 260."""
    return _scaled(width=1.1, depth=1.2)


def _scaled(width: float, depth: float) -> MobileNet:
    """Channels round to the nearest multiple of 8 and depths up.

    The Lite variant keeps the stem, the last conv and the depths of the first and last stage.
    """
    inner = range(1, len(STAGES) - 1)
    stages = tuple(
        stage._replace(
            channels=int(stage.channels * width + 4) // 8 * 8,
            depth=math.ceil(stage.depth * depth) if index in inner else stage.depth,
        )
        for index, stage in enumerate(STAGES)
    )
    return MobileNet(stages, style=ConvStyle(epsilon=1e-3, same=True))
