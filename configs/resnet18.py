"""ResNet-18 on ImageNet.

Paper:   float 71.01; AdaRound / BRECQ / QDrop / AQuant (top-1 %)
    w4a4  69.49 / 69.45 / 69.61 / 70.03
    w2a4  63.64 / 64.84 / 65.16 / 66.63
    w3a3  66.00 / 66.01 / 66.65 / 67.97
    w2a2  - / 51.12 / 54.19 / 60.31
Float:   not run.
Ours:    not run (neither ImageNet nor the checkpoint is at hand here).
Steps:   20,000 per block, batch 32, as the paper's.
Cost:    not measured.
Command: python -m launch.quantize --config=configs/resnet18.py:w2a2,preset=aquant \
             --data_dir=DIR --workdir=runs/resnet18_w2a2

DIR/weights/resnet18.safetensors is written by launch.convert --model=resnet18 from
the checkpoint of the BRECQ/QDrop model zoo. Variants: w4a4, w2a4, w3a3, w2a2 (the default),
preset=NAME, dataset=imagenet2012 or imagenet_v2/matched-frequency;
--config.dataset=folder:PATH reads class folders.
"""

from ml_collections import ConfigDict

from configs import imagenet


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config of a variant."""
    return imagenet.config(argument, "resnet18")
