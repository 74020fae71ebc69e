"""How the images of a config are read."""

from aquant_jax import data
from launch.lib.command_line import Config

DEFAULTS = {"digits_cnn": data.DIGITS}  # of networks whose configs have no field for it


def of(config: Config, dataset: str) -> data.Preprocessing | None:
    """That of the config, or else of its network; None leaves it to the data set."""
    if fields := config.get("preprocessing"):
        return data.Preprocessing(**fields.to_dict())
    return None if dataset == "digits" else DEFAULTS.get(config.model)
