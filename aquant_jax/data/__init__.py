"""Data sets of the configs: ``load(name, data_dir)`` gives a ``Dataset``."""

from pathlib import Path

from aquant_jax.data import cifar, digits
from aquant_jax.data.source import Dataset, Split
from aquant_jax.errors import InputError

__all__ = ["DATASETS", "Dataset", "Split", "load"]

DATASETS = ("cifar10", "cifar10_jpeg", "digits")


def load(name: str, data_dir: str | Path = "~") -> Dataset:
    """Opens a data set by name.

    Args:
        name: one of ``DATASETS``.
        data_dir: the folder whose ``tensorflow_datasets/`` holds the prepared sets (the
            default, the home directory, is where tfds puts them); digits need none.

    Raises:
        InputError: unknown name, a missing package, or a set that is not prepared.
    """
    if name not in DATASETS:
        raise InputError(f"unknown data set {name!r}; there are {', '.join(DATASETS)}")
    if name == "digits":
        return digits.load()
    return cifar.load(name, Path(data_dir).expanduser() / "tensorflow_datasets")
