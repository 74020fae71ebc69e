"""Labelled data sets that are read in batches."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from aquant_jax.errors import InputError


class Split(NamedTuple):
    """Inputs of the model, and their labels [N].

    Images are [N, H, W, C] float32, normalised as the model expects, with int32 labels.
    """

    inputs: Any
    labels: np.ndarray


BATCH = 256  # samples that are read at once
Allocate = Callable[[tuple[int, ...], Any], np.ndarray]
OnCorrupt = Callable[[str], object] | None
Stream = Callable[[str, np.ndarray, int, int, OnCorrupt], Iterator[Split]]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training split to calibrate on and a held-out test split to score on.

    Attributes:
        name: of the data set.
        num_classes: number of labels, 1 for a regression, 0 where the score has none.
        train_size: samples in the training split, 0 where there is none.
        test_size: samples in the test split, 0 where there is none.
        stream: ``stream("train" | "test", indices, seed, batch_size, on_corrupt)`` gives the
            samples at `indices`, in that order, in batches of which only the last may be smaller;
            the seed is that of random crops.
        metric: ``top1``, or that of a task of GLUE, such as ``matthews``.
    """

    name: str
    num_classes: int
    train_size: int
    test_size: int
    stream: Stream
    metric: str = "top1"

    def check_calibration(self, n: int) -> None:
        """Checks the size of ``calibration(n)`` without reading anything.

        Raises:
            InputError: ``n`` is not positive or more than the training split has.
        """
        _check("calibration", n, self.name, "training", self.train_size)

    def calibration(
        self, n: int, seed: int = 0, on_corrupt: OnCorrupt = None, allocate: Allocate = np.empty,
        rows: slice = slice(None),
    ) -> Split:  # fmt: skip
        """Draws ``n`` different training samples, the same ones for the same seed.

        Args:
            n: number of samples.
            seed: of the draw and of random crops.
            on_corrupt: receives the name of every image that cannot be decoded and is left out;
                None makes such an image an error.
            allocate: ``allocate(shape, dtype)`` makes the array of an input, which is filled a few
                samples at a time; it may be mapped from a file.
            rows: those of the samples that are read, which is done without the others.

        Raises:
            InputError: ``n`` is not positive or more than the training split has, an image cannot
                be read, or samples differ in size.
        """
        self.check_calibration(n)
        indices = np.random.default_rng(seed).permutation(self.train_size)[:n]
        return self._read("train", indices[rows], seed, on_corrupt, allocate)

    def test(self, limit: int | None = None) -> Split:
        """Reads the test split, or its first ``limit`` images, into memory.

        Raises:
            InputError: ``limit`` is not positive or more than the test split has, or an image
                cannot be read.
        """
        return self._read("test", self._test_indices(limit), 0, None)

    def batches(
        self, batch_size: int, limit: int | None = None, on_corrupt: OnCorrupt = None
    ) -> Iterator[Split]:
        """Reads the test split in batches; the next batch is read while one is used.

        Args:
            batch_size: samples per batch; the last one may have fewer.
            limit: number of the first samples to read; all by default.
            on_corrupt: see ``calibration``.

        Raises:
            InputError: see ``test``, or ``batch_size`` is not positive.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}, must be at least 1")
        return self.stream("test", self._test_indices(limit), 0, batch_size, on_corrupt)

    def _test_indices(self, limit: int | None) -> np.ndarray:
        n = self.test_size if limit is None else limit
        _check("test", n, self.name, "test", self.test_size)
        return np.arange(n)

    def _read(
        self, split: str, indices: np.ndarray, seed: int, on_corrupt: OnCorrupt,
        allocate: Allocate = np.empty,
    ) -> Split:  # fmt: skip
        """The samples at `indices`, in arrays that are filled batch by batch."""
        size, end = min(len(indices), BATCH), 0
        arrays: Split | None = None
        for batch in self.stream(split, indices, seed, size, on_corrupt):
            if arrays is None:
                arrays = jax.tree.map(
                    lambda leaf: allocate((len(indices), *leaf.shape[1:]), leaf.dtype), batch
                )
            start, end = end, end + len(batch.labels)
            pairs = zip(jax.tree.leaves(arrays), jax.tree.leaves(batch), strict=True)
            for array, leaf in pairs:
                if array.shape[1:] != leaf.shape[1:]:
                    raise InputError(
                        f"samples of {self.name} differ in size, such as {array.shape[1:]} and "
                        f"{leaf.shape[1:]}"
                    )
                array[start:end] = leaf
        if arrays is None:
            of = f"{len(indices)} {split} images of {self.name}"
            raise InputError(f"not one of the {of} is readable")
        return jax.tree.map(lambda array: array[:end], arrays)


def in_memory(name: str, num_classes: int, train: Split, test: Split) -> Dataset:
    """Makes a data set of arrays.

    Args:
        name: of the data set.
        num_classes: number of labels.
        train: to calibrate on.
        test: to score on.
    """
    splits = {"train": train, "test": test}

    def stream(
        split: str, indices: np.ndarray, seed: int, batch_size: int, on_corrupt: OnCorrupt
    ) -> Iterator[Split]:
        inputs, labels = splits[split]
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            yield Split(inputs[batch], labels[batch])

    return Dataset(name, num_classes, len(train.labels), len(test.labels), stream)


def _check(purpose: str, n: int, name: str, split: str, size: int) -> None:
    if size == 0:
        other = "; name a calibration_dataset" if split == "training" else ""
        raise InputError(f"{name} has no {split} split for {n} {purpose} samples{other}")
    if not 0 < n <= size:
        raise InputError(f"{n} {purpose} samples asked of {name}, whose {split} split has {size}")
