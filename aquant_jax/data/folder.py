"""A folder of class folders: ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``.

References:
    torchvision.datasets.ImageFolder: labels are the indices of the sorted class names.
"""

from pathlib import Path

import numpy as np

from aquant_jax.data.preprocess import Preprocessing
from aquant_jax.data.records import NONE, Record, Records, dataset
from aquant_jax.data.source import Dataset
from aquant_jax.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
ORDER_SEED = 0


def load(path: Path, preprocessing: Preprocessing) -> Dataset:
    """Opens ``path/train`` and ``path/val``, either of which may be absent.

    Args:
        path: the folder.
        preprocessing: that of the checkpoint.

    Raises:
        InputError: both are missing, their classes differ, or a class has no image.
    """
    parts = {split: path / split for split in ("train", "val") if (path / split).is_dir()}
    if not parts:
        raise InputError(f"{path} holds neither train/ nor val/, each with a folder a class")
    classes = {split: _classes(part) for split, part in parts.items()}
    _check_same(path, classes)
    records = {split: _records(part, classes[split]) for split, part in parts.items()}
    number = len(next(iter(classes.values())))
    train, val = (records.get(split, NONE) for split in ("train", "val"))
    return dataset(f"folder:{path}", number, train, val, preprocessing)


def _classes(part: Path) -> list[str]:
    names = sorted(entry.name for entry in part.iterdir() if entry.is_dir())
    if not names:
        raise InputError(f"{part} holds no class folders")
    return names


def _check_same(path: Path, classes: dict[str, list[str]]) -> None:
    for split, other in (("val", "train"), ("train", "val")):
        missing = sorted(set(classes.get(other, ())) - set(classes.get(split, ())))
        if missing and split in classes:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise InputError(
                f"{path / split} lacks {len(missing)} of the {len(classes[other])} class folders "
                f"of {other}/: {shown}"
            )


def _records(part: Path, classes: list[str]) -> Records:
    files: list[tuple[str, int]] = []
    for label, name in enumerate(classes):
        images = sorted(
            str(file) for file in (part / name).rglob("*") if file.suffix.lower() in SUFFIXES
        )
        if not images:
            raise InputError(f"class folder {part / name} holds no images")
        files += [(file, label) for file in images]
    # On disk the classes follow one another: without a permutation, the first images would all be
    # of the first classes.
    order = np.random.default_rng(ORDER_SEED).permutation(len(files))

    def read(index: int) -> Record:
        file, label = files[order[index]]
        return Record(file, Path(file).read_bytes(), label)

    return Records(len(files), read)
