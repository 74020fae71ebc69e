"""MobileNetV2 1.0.

References:
    Sandler et al., MobileNetV2 (arXiv:1801.04381), Table 2.
"""

from aquant_jax.models.mobile import MobileNet, Stage

STAGES = (
    Stage(expansion=1, channels=16, depth=1, stride=1),
    Stage(expansion=6, channels=24, depth=2, stride=2),
    Stage(expansion=6, channels=32, depth=3, stride=2),
    Stage(expansion=6, channels=64, depth=4, stride=2),
    Stage(expansion=6, channels=96, depth=3, stride=1),
    Stage(expansion=6, channels=160, depth=3, stride=2),
    Stage(expansion=6, channels=320, depth=1, stride=1),
)


def mobilenetv2() -> MobileNet:
    """3,504,872 parameters."""
    return MobileNet(STAGES)
