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
