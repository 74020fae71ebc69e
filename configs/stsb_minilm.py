from ml_collections import ConfigDict

from configs import glue, variants


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config of a variant."""
    variant = variants.parse(argument, "w4a4", **glue.CHOICES)
    config = glue.config(variant, "stsb", "weights/all-MiniLM-L6-v2", steps=300)
    config.apart = True  # each sentence is embedded alone
    config.max_length = 64
    config.calibration_length = 32
    return config
