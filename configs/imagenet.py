"""The common part of the configs of the paper's ImageNet networks."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from aquant_jax import data
from configs import variants

DATASETS = ("imagenet2012", "imagenet_v2/matched-frequency", "imagenet_val_1300")
# These have no training split of their own.
CALIBRATION = {
    "imagenet_v2/matched-frequency": ("imagenet2012", 1024),
    "imagenet_val_1300": ("imagenet_sample_1000", 1000),
}


def config(
    argument: str,
    model: str,
    preprocessing: data.Preprocessing = data.IMAGENET,
    light: bool = False,
    **fields: Any,
) -> ConfigDict:
    """The config of a network.

    Args:
        argument: of the variant: bit-width, preset, dataset.
        model: name in the zoo; its weights are ``weights/MODEL.safetensors`` in data_dir, as
            ``launch.convert`` writes them.
        preprocessing: of the checkpoint's authors.
        light: aquant has linear borders, as the paper uses for networks of depthwise convs. For
            all networks, the taps of a channel share a border, as in the paper.
        **fields: of the recipe, where the network differs from the others.
    """
    choices = {"dataset": DATASETS, "transforms": tuple(variants.TRANSFORMS)}
    variant = variants.parse(argument, preset=variants.PRESETS, **choices)
    chosen = ConfigDict()
    chosen.model = model
    chosen.weights = f"weights/{model}.safetensors"
    chosen.dataset = variant.settings["dataset"]
    calibration = CALIBRATION.get(chosen.dataset, (chosen.dataset, 1024))
    chosen.calibration_dataset, chosen.calibration_size = calibration
    chosen.preprocessing = ConfigDict(dataclasses.asdict(preprocessing))
    chosen.skip_corrupt = False
    chosen.test_limit = None
    chosen.eval_batch_size = 100
    chosen.augment = "flip_and_shift"  # in the whole-network stage
    chosen.preset = variant.settings["preset"]
    if chosen.preset in ("aquant", "aquant_plus"):
        fields |= {"border_granularity": "mean", "border": "linear" if light else "quadratic"}
    fields["transforms"] = variants.TRANSFORMS[variant.settings["transforms"]]
    chosen.recipe = variants.recipe(variant, steps=20_000, finetune_loss="kl", **fields)
    return chosen
