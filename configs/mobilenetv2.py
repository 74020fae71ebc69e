"""MobileNetV2 1.0 on ImageNet.

Paper:   float 72.63; AdaRound / BRECQ / QDrop / AQuant (top-1 %)
    w4a4  67.53 / 68.29 / 68.57 / 69.15
    w2a4  44.90 / 53.43 / 54.22 / 56.74
    w3a3  48.92 / 54.66 / 57.68 / 58.56
    w2a2  - / 7.44 / 11.45 / 14.19
Float:   not run.
Ours:    not run (neither ImageNet nor the checkpoint is at hand here).
Steps:   20,000 per block, batch 32, as the paper's.
Cost:    not measured.
Command: python -m launch.quantize --config=configs/mobilenetv2.py:w2a2,preset=aquant \
             --data_dir=DIR --workdir=runs/mobilenetv2_w2a2

DIR/weights/mobilenetv2.safetensors is written by launch.convert --model=mobilenetv2 from
the checkpoint of the BRECQ/QDrop model zoo. Variants: w4a4, w2a4, w3a3, w2a2 (the default),
preset=NAME, dataset=imagenet2012 or imagenet_v2/matched-frequency;
--config.dataset=folder:PATH reads class folders.
AQuant has linear borders here, lambda is 0.1.
"""

from ml_collections import ConfigDict

from configs import imagenet


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config of a variant."""
    return imagenet.config(argument, "mobilenetv2", light=True, rounding_weight=0.1)
