"""MNASNet 2.0 on ImageNet.

Paper:   float 76.52; AdaRound / BRECQ / QDrop / AQuant (top-1 %)
    w4a4  71.80 / 73.24 / 73.54 / 73.78
    w2a4  51.03 / 62.11 / 63.78 / 65.27
    w3a3  50.48 / 64.16 / 66.43 / 68.96
    w2a2  - / 13.32 / 28.65 / 30.31
Float:   not run.
Ours:    not run (neither ImageNet nor the checkpoint is at hand here).
Steps:   20,000 per block, batch 32, as the paper's.
Cost:    not measured.
Command: python -m launch.quantize --config=configs/mnasnet2.py:w2a2,preset=aquant \
             --data_dir=DIR --workdir=runs/mnasnet2_w2a2

DIR/weights/mnasnet2.safetensors is written by launch.convert --model=mnasnet2 from
the checkpoint of the BRECQ/QDrop model zoo. Variants: w4a4, w2a4, w3a3, w2a2 (the default),
preset=NAME, dataset=imagenet2012 or imagenet_v2/matched-frequency;
--config.dataset=folder:PATH reads class folders.
AQuant has linear borders here, lambda is 0.2.
"""

from ml_collections import ConfigDict

from configs import imagenet


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config of a variant."""
    return imagenet.config(argument, "mnasnet2", light=True, rounding_weight=0.2)
