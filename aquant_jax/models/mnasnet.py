"""MNASNet with a depth multiplier of 2.0: twice the channels of MnasNet-B1, its head excepted.

References:
    Tan et al., MnasNet (arXiv:1807.11626). The network is the one of torchvision's ``MNASNet``,
    which doubles the channels of the stem too and has ReLU in place of ReLU6.
"""

import flax.linen as nn

from aquant_jax.models.mobile import MobileNet, Stage

STAGES = (
    Stage(expansion=3, channels=48, depth=3, stride=2),
    Stage(expansion=3, channels=80, depth=3, stride=2, size=5),
    Stage(expansion=6, channels=160, depth=3, stride=2, size=5),
    Stage(expansion=6, channels=192, depth=2, stride=1),
    Stage(expansion=6, channels=384, depth=4, stride=2, size=5),
    Stage(expansion=6, channels=640, depth=1, stride=1),
)


def mnasnet2() -> MobileNet:
    """12,469,944 parameters."""
    return MobileNet(STAGES, stem_channels=64, separable=32, activation=nn.relu)
