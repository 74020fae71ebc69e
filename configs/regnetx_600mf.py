"""RegNetX-600MF on ImageNet.

Paper:   float 73.53; AdaRound / BRECQ / QDrop / AQuant (top-1 %)
    w4a4  70.87 / 70.96 / 71.19 / 71.68
    w2a4  58.95 / 62.41 / 63.59 / 65.71
    w3a3  61.99 / 63.79 / 65.37 / 67.11
    w2a2  - / 29.84 / 41.53 / 46.61
Float:   not run.
Ours:    not run (neither ImageNet nor the checkpoint is at hand here).
Steps:   20,000 per block, batch 32, as the paper's.
Cost:    not measured.
Command: python -m launch.quantize --config=configs/regnetx_600mf.py:w2a2,preset=aquant \
             --data_dir=DIR --workdir=runs/regnetx_600mf_w2a2

DIR/weights/regnetx_600mf.safetensors is written by launch.convert --model=regnetx_600mf from
the checkpoint of the BRECQ/QDrop model zoo. Variants: w4a4, w2a4, w3a3, w2a2 (the default),
preset=NAME, dataset=imagenet2012 or imagenet_v2/matched-frequency;
--config.dataset=folder:PATH reads class folders.
"""

from ml_collections import ConfigDict

from configs import imagenet


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config of a variant."""
    return imagenet.config(argument, "regnetx_600mf")
