"""RegNetX-3.2GF on ImageNet.

Paper:   float 78.45; AdaRound / BRECQ / QDrop / AQuant (top-1 %)
    w4a4  76.41 / 76.64 / 76.76 / 77.03
    w2a4  64.66 / 71.21 / 71.34 / 72.98
    w3a3  68.65 / 71.75 / 72.69 / 74.09
    w2a2  - / 41.88 / 54.61 / 57.48
Float:   not run.
Ours:    not run (neither ImageNet nor the checkpoint is at hand here).
Steps:   20,000 per block, batch 32, as the paper's.
Cost:    not measured.
Command: python -m launch.quantize --config=configs/regnetx_3200mf.py:w2a2,preset=aquant \
             --data_dir=DIR --workdir=runs/regnetx_3200mf_w2a2

DIR/weights/regnetx_3200mf.safetensors is written by launch.convert --model=regnetx_3200mf from
the checkpoint of the BRECQ/QDrop model zoo. Variants: w4a4, w2a4, w3a3, w2a2 (the default),
preset=NAME, dataset=imagenet2012 or imagenet_v2/matched-frequency;
--config.dataset=folder:PATH reads class folders.
"""

from ml_collections import ConfigDict

from configs import imagenet


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config of a variant."""
    return imagenet.config(argument, "regnetx_3200mf")
