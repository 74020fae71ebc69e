"""Data sets of the configs: ``load(name, data_dir)`` gives a ``Dataset``."""

from pathlib import Path

from aquant_jax.data import digits, folder, glue, tfds
from aquant_jax.data.glue import Tokenization
from aquant_jax.data.preprocess import CIFAR, DIGITS, EFFICIENTNET_LITE, IMAGENET, Preprocessing
from aquant_jax.data.source import Dataset, OnCorrupt, Split
from aquant_jax.errors import InputError

__all__ = [
    "DATASETS",
    "DIGITS",
    "EFFICIENTNET_LITE",
    "IMAGENET",
    "Dataset",
    "OnCorrupt",
    "Preprocessing",
    "Split",
    "Tokenization",
    "load",
]

DATASETS = ("digits", *tfds.SETS)  # those that configs name; load takes more
FOLDER = "folder:"
_PREPROCESSING = {"cifar10": CIFAR, "cifar10_jpeg": CIFAR}


def load(
    name: str,
    data_dir: str | Path = "~",
    preprocessing: Preprocessing | Tokenization | None = None,
    test_split: str | None = None,
) -> Dataset:
    """Opens a data set by name.

    Args:
        name: ``digits``; ``folder:PATH`` with the class folders in ``train/`` and ``val/`` of
            PATH, which is in ``data_dir`` unless it is absolute; or an image classification set
            of tfds, such as ``imagenet2012``, ``imagenet_v2/matched-frequency``, ``cifar10``.
        data_dir: the folder whose ``tensorflow_datasets/`` holds the prepared sets (the
            default, the home directory, is where tfds puts them); digits need none.
        preprocessing: that of the checkpoint; by default CIFAR's for CIFAR, ``IMAGENET`` for
            all others; digits have none. GLUE (``glue/sst2``) needs a `Tokenization`.
        test_split: of a tfds set, to score on; validation by default, or else test.

    Raises:
        InputError: unknown name, a missing package, or a set that is not prepared.
    """
    if name == "digits":
        if preprocessing is not None:
            raise InputError("digits have no preprocessing to choose")
        return digits.load()
    root = Path(data_dir).expanduser()
    if name.startswith(glue.PREFIX):
        if not isinstance(preprocessing, Tokenization):
            raise InputError(f"{name} needs the tokenizer of a checkpoint (data.Tokenization)")
        return glue.load(name, root / "tensorflow_datasets", preprocessing)
    if isinstance(preprocessing, Tokenization):
        raise InputError(f"{name} is a set of images; a network of sentences cannot read it")
    preprocessing = preprocessing or _PREPROCESSING.get(name, IMAGENET)
    if name.startswith(FOLDER):
        return folder.load(root / name.removeprefix(FOLDER), preprocessing)
    return tfds.load(name, root / "tensorflow_datasets", preprocessing, test_split)
