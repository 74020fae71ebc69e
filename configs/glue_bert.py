"""BERT-base, fine-tuned, on the GLUE tasks of the paper's Table 2.

Paper:   W4A4 (its text says W4A6), AdaRound / AQuant, float in brackets, percent:
             CoLA 43.82 / 45.23 (58.59 Matthews)     SST-2 82.45 / 84.06 (91.28)
             MRPC 87.92 / 88.62 (89.54 F1)           STS-B 83.13 / 83.87 (89.14 Pearson)
             QQP 74.24 / 75.87 (87.98 F1)            MNLI 65.77 / 68.57 (84.06 matched)
             QNLI 83.29 / 83.45 (91.19)              RTE 55.60 / 61.37 (70.39)
Float:   not run: no fine-tuned BERT-base is at hand
Ours:    not run for BERT-base; MiniLM, w4a4,sums=8, adaround / aquant_bert, seed 0: MRPC 83.22 /
         82.29 (float 85.71), RTE 57.04 / 58.12 (57.04), CoLA 8.68 / 12.56 (21.99), SST-2 80.28 /
         79.36 (84.06); commands in docs/results.md
Cost:    MiniLM, 200 steps of 8, one core (CPU): 2 to 3 minutes a run, and half a minute of scoring
Command: python -m launch.finetune --task=sst2 --checkpoint=BERT --data_dir=DIR --workdir=runs/sst2
         python -m launch.quantize --config=configs/glue_bert.py:sst2,w4a4 --data_dir=DIR \
             --config.weights=$PWD/runs/sst2/checkpoint --workdir=runs/sst2_w4a4

Variants: a task (cola, sst2 (the default), mrpc, stsb, qqp, mnli, qnli, rte); w4a4, w4a6, w4a8,
w8a8; preset=aquant_bert, adaround, nearest; blocks=layers or blocks=sub-blocks (attention and
feed-forward) instead of the presets' single layers; sums=8 keeps the residual sums at 8 bits. The
checkpoint of a task is weights/bert-TASK in data_dir. The classifier and its input stay float, the
pooler's weights and input do not.
"""

from ml_collections import ConfigDict

from aquant_jax.data.glue import TASKS
from configs import glue, variants

DEFAULT = "sst2"


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config of a variant."""
    tasks = (DEFAULT, *(task for task in TASKS if task != DEFAULT))
    variant = variants.parse(argument, "w4a4", task=tasks, **glue.CHOICES)
    task = variant.settings["task"]
    keep = ({"pattern": "classifier", "keep_float": True},)
    loss = "mse" if TASKS[task].labels == 1 else "kl"
    fields = {"steps": 20_000, "finetune_loss": loss}
    config = glue.config(variant, task, f"weights/bert-{task}", keep, **fields)
    config.max_length = config.calibration_length = 128
    return config
