"""ResNet-20 on CIFAR-10, its public weights.

Paper:   none for this network.
Float:   81.03% top-1 on cifar10_jpeg test (10,000 images, re-encoded as JPEG).
Ours:    w2a2, 1,000 steps: aquant 68.29 +- 0.84 (seeds 0, 1, 2); the table of all presets and
         bit-widths is in docs/results.md
Cost:    2 to 3 minutes by adaround, brecq, qdrop, 7 to 14 by aquant (CPU, one loaded core)
Command: python -m launch.quantize --config=configs/cifar10_resnet20.py:w2a2,preset=aquant \
             --data_dir=../shared/data --workdir=runs/resnet20_w2a2

Variants: w4a4, w2a4, w3a3, w2a2 (the default) ..., preset=NAME, dataset=cifar10 for the
lossless set. --data_dir names the folder that holds tensorflow_datasets/ and weights/.
"""

from ml_collections import ConfigDict

from configs import variants


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config of a variant."""
    variant = variants.parse(argument, preset=variants.PRESETS, dataset=("cifar10_jpeg", "cifar10"))
    config = ConfigDict()
    config.model = "resnet20_cifar"
    config.weights = "weights/cifar_resnet20.safetensors"  # in data_dir
    config.dataset = variant.settings["dataset"]
    config.calibration_size = 1024
    config.test_limit = None  # of the test images; None for all
    config.eval_batch_size = 500
    config.augment = "flip_and_shift"  # in the whole-network stage
    config.preset = variant.settings["preset"]
    config.recipe = variants.recipe(variant, steps=1000, finetune_loss="kl")
    return config
