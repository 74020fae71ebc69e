"""ResNet-50 on ImageNet.

Paper:   float 76.62; AdaRound / BRECQ / QDrop / AQuant (top-1 %)
    w4a4  74.82 / 75.05 / 75.40 / 75.58
    w2a4  66.61 / 70.27 / 70.71 / 71.11
    w3a3  69.72 / 71.73 / 72.38 / 73.20
    w2a2  - / 51.36 / 57.38 / 60.04
Float:   not run.
Ours:    not run (neither ImageNet nor the checkpoint is at hand here).
Steps:   20,000 per block, batch 32, as the paper's.
Cost:    not measured.
Command: python -m launch.quantize --config=configs/resnet50.py:w2a2,preset=aquant \
             --data_dir=DIR --workdir=runs/resnet50_w2a2

DIR/weights/resnet50.safetensors is written by launch.convert --model=resnet50 from
the checkpoint of the BRECQ/QDrop model zoo. Variants: w4a4, w2a4, w3a3, w2a2 (the default),
preset=NAME, dataset=imagenet2012 or imagenet_v2/matched-frequency;
--config.dataset=folder:PATH reads class folders.
"""

from ml_collections import ConfigDict

from configs import imagenet


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config of a variant."""
    return imagenet.config(argument, "resnet50")
