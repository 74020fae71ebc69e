"""EfficientNet-Lite0 on ImageNet samples, its public weights.

Paper:   none for this network.
Float:   82.31% top-1 of the 1,300 validation images.
Ours:    100 steps of 16, seed 0: w8a8 by qdrop 82.31%; w4a4 by nearest 7.08%, by qdrop 61.15%,
         by aquant 74.08%; 500 steps and 400 of the whole network by aquant_plus 77.62%;
         an average of 4 bits that launch.allocate chose, by aquant with 100 steps 78.69%
Cost:    18 min by aquant at w4a4 (CPU, one loaded core), 90 min by that aquant_plus
Command: python -m launch.quantize --config=configs/efficientnet_lite0.py:w4a4,preset=aquant \
             --data_dir=../shared/data --workdir=runs/lite0_w4a4 \
             --config.recipe.reconstruction.steps=100 --config.recipe.reconstruction.batch_size=16

Variants: w8a8, w4a4, w2a4, w3a3, w2a2 (the default), preset=NAME, transforms=shift_scale, and
dataset=imagenet_val_1300 (the default: 1,300 validation images, calibrated on
imagenet_sample_1000), imagenet2012 or imagenet_v2/matched-frequency. On the sample the numbers
compare float with quantized; they are no "ImageNet accuracy". AQuant has linear borders, as for
the paper's networks of depthwise convs.
"""

import dataclasses

from ml_collections import ConfigDict

from aquant_jax import data
from configs import imagenet


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config of a variant."""
    return config(argument, "efficientnet_lite0", 224)


def config(argument: str, model: str, size: int) -> ConfigDict:
    """The config of a network of the family.

    Args:
        argument: of the variant: bit-width, preset, dataset.
        model: name in the zoo.
        size: side of its images, in pixels. Its authors crop ``size / (size + 32)`` of an image.
    """
    if "dataset=" not in argument:
        argument = ",".join(filter(None, [argument, "dataset=imagenet_val_1300"]))
    preprocessing = dataclasses.replace(data.EFFICIENTNET_LITE, size=size, resize=size + 32)
    if "dataset=imagenet_val_1300" in argument:
        # The images of the sample are 227 x 227 squares that lost their margins already.
        preprocessing = dataclasses.replace(preprocessing, geometry="squash")
    return imagenet.config(argument, model, preprocessing, light=True)
