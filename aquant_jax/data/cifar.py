"""CIFAR-10 through TensorFlow Datasets' random-access sources, without TensorFlow."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from aquant_jax.data.source import Dataset, Split
from aquant_jax.errors import InputError

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
_PREPARE = (
    "python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', "
    "data_dir='{folder}', file_format='array_record').download_and_prepare()\""
)


def load(name: str, tfds_dir: str | Path) -> Dataset:
    """Opens ``cifar10`` or ``cifar10_jpeg`` (the same images re-encoded as JPEG).

    Args:
        name: the tfds name.
        tfds_dir: the tfds data directory that holds it prepared as array_record.

    Returns:
        Images [N, 32, 32, 3], normalised for the ResNets of ``models.resnet_cifar``.

    Raises:
        InputError: tfds is not installed, or the data set is not prepared there.
    """
    sources = _open(name, Path(tfds_dir))

    def read(split: str, indices: np.ndarray) -> Split:
        records = [sources[split][int(index)] for index in indices]
        images = np.stack([_decode(record["image"]) for record in records])
        return Split(normalise(images), np.array([r["label"] for r in records], np.int32))

    return Dataset(name, 10, len(sources["train"]), len(sources["test"]), read)


def normalise(images: np.ndarray) -> np.ndarray:
    """Maps pixels [..., 3] in 0..255 to zero mean and unit deviation a channel."""
    return (images.astype(np.float32) / np.float32(255) - MEAN) / STD


def _decode(encoded: bytes) -> np.ndarray:
    # tfds would decode with OpenCV where it is installed; one decoder keeps numbers the same.
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))


def _open(name: str, tfds_dir: Path) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f"{name} needs tensorflow-datasets: pip install 'aquant-jax[data]'"
        ) from error
    skip = {"image": tfds.decode.SkipDecoding()}
    try:
        # tfds raises a different type for every way in which a data set is not there.
        return tfds.data_source(name, data_dir=str(tfds_dir), decoders=skip, download=False)
    except Exception as error:
        command = _PREPARE.format(name=name, folder=tfds_dir)
        hint = f"prepare it with: {command}"
        if name == "cifar10_jpeg":
            hint = "it is not in the public tfds catalogue: copy its prepared folder there"
        raise InputError(f"data set {name} is not prepared in {tfds_dir}; {hint}") from error
