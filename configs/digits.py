"""The embedded default: a residual CNN (25k parameters) on 8x8 digits, both in the package.

Paper:   none; the network and the data come with the package so that anyone can run it.
Float:   99.60% top-1 of the 500 held-out images; trained with seed 0 (10 s on two cores) by
             python -m launch.train_digits --output=aquant_jax/models/digits_cnn.safetensors
Ours:    w2a2, 250 steps, seed 0: nearest 53.60, adaround 91.00, brecq 92.20, qdrop 82.40,
         aquant 96.80 (make demo; CPU, two cores)
Cost:    3 s (nearest) to 10 s (aquant), on two free cores
Command: python -m launch.quantize --config=configs/digits.py:w2a2,preset=aquant \
             --workdir=runs/digits_w2a2
         make demo    (all five presets at w2a2)

Variants: w4a4, w2a4, w3a3, w2a2 (the default) ..., preset=NAME.
"""

from ml_collections import ConfigDict

from configs import variants


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config of a variant."""
    variant = variants.parse(argument, preset=variants.PRESETS)
    config = ConfigDict()
    config.model = "digits_cnn"
    config.weights = "embedded"  # those that come with the package
    config.dataset = "digits"
    config.calibration_size = 1024
    config.test_limit = None  # of the held-out images; None for all
    config.eval_batch_size = 250
    config.augment = "shift"  # in the whole-network stage
    config.preset = variant.settings["preset"]
    config.recipe = variants.recipe(variant, steps=250, finetune_loss="kl")
    return config
