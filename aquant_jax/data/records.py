"""Encoded images at random access, decoded and preprocessed ahead of their use."""

import dataclasses
import io
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from aquant_jax.data.preprocess import Preprocessing, for_calibration, for_evaluation
from aquant_jax.data.source import Dataset, OnCorrupt, Split
from aquant_jax.errors import InputError, install_command

READ_AHEAD = 256  # decoded images that wait at most


class Record(NamedTuple):
    """An encoded image and its label."""

    name: str
    encoded: bytes
    label: int


@dataclasses.dataclass(frozen=True)
class Records:
    """One split: ``read(i)`` for i in 0 .. size - 1, callable from several threads."""

    size: int
    read: Callable[[int], Record]


class Corrupt(NamedTuple):
    """An image that cannot be read or decoded, and the reason."""

    name: str
    reason: str


Loaded = tuple[np.ndarray, int] | Corrupt
NONE = Records(0, lambda index: Record("", b"", -1))


def dataset(
    name: str,
    num_classes: int,
    train: Records,
    test: Records,
    preprocessing: Preprocessing,
) -> Dataset:
    """Makes a data set of encoded images.

    Args:
        name: of the data set.
        num_classes: number of labels.
        train: to calibrate on, by random crops.
        test: to score on.
        preprocessing: that of the checkpoint.
    """
    splits = {"train": train, "test": test}

    def stream(
        split: str, indices: np.ndarray, seed: int, batch_size: int, on_corrupt: OnCorrupt
    ) -> Iterator[Split]:
        def load(index: int) -> Loaded:
            # One generator per image: its draws do not depend on the thread that decodes it.
            rng = np.random.default_rng((seed, index)) if split == "train" else None
            try:
                record = splits[split].read(index)
            except OSError as error:
                return Corrupt(str(error.filename or index), error.strerror or str(error))
            return decode(record, preprocessing, rng)

        loaded = _ahead(load, indices.tolist(), min(batch_size, READ_AHEAD))
        readable = _readable(loaded, name, on_corrupt)
        while batch := list(itertools.islice(readable, batch_size)):
            images, labels = zip(*batch, strict=True)
            yield Split(_stack(images, name), np.array(labels, np.int32))

    return Dataset(name, num_classes, train.size, test.size, stream)


def decode(
    record: Record, preprocessing: Preprocessing, rng: np.random.Generator | None = None
) -> Loaded:
    """Decodes and preprocesses one image.

    Args:
        record: of any format that PIL reads, in any mode.
        preprocessing: resize, crop and normalisation.
        rng: for a random crop; None for evaluation.

    Returns:
        The image [size, size, channels] and its label, or ``Corrupt``.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(record.encoded)) as file:
            image = file.convert("L" if preprocessing.channels == 1 else "RGB")
    # PIL's exception depends on the format and on the bytes that are wrong.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        return Corrupt(record.name, str(error))
    if rng is None:
        return for_evaluation(image, preprocessing), record.label
    return for_calibration(image, preprocessing, rng), record.label


def _ahead(load: Callable[[int], Loaded], indices: list[int], ahead: int) -> Iterator[Loaded]:
    """The images at `indices`, loaded by threads ahead of their use.

    Threads suffice, because PIL releases the interpreter lock while it decodes and resizes. On two
    cores, two threads gave 431 images/s and two of grain's worker processes, which start in seconds
    and copy every float, 262.
    """
    try:
        import grain
    except ImportError as error:
        raise InputError(f"reading images needs grain: {install_command('data')}") from error
    options = grain.ReadOptions(num_threads=_cores(), prefetch_buffer_size=ahead)
    images: Any = iter(grain.MapDataset.source(indices).map(load).to_iter_dataset(options))
    try:
        yield from images
    finally:
        images.close()


def _readable(
    images: Iterator[Loaded], name: str, on_corrupt: OnCorrupt
) -> Iterator[tuple[np.ndarray, int]]:
    """The images that could be decoded; the others are reported, or are errors."""
    for image in images:
        if not isinstance(image, Corrupt):
            yield image
        elif on_corrupt is None:
            raise InputError(
                f"corrupt image {image.name} in {name} ({image.reason}); "
                "set skip_corrupt to leave such images out and count them"
            )
        else:
            on_corrupt(image.name)


def _stack(images: tuple[np.ndarray, ...], name: str) -> np.ndarray:
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise InputError(
            f"images of {name} differ in size, such as {' and '.join(map(str, sorted(shapes)[:2]))}"
            ": geometry 'keep' does not suit them"
        )
    return np.stack(images)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
