"""A labelled image set in memory, and how to draw from it."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from aquant_jax.errors import InputError


class Split(NamedTuple):
    """Images [N, H, W, C] float32, normalised as the model expects, and labels [N] int32."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training split to calibrate on and a held-out test split to score on.

    Attributes:
        name: of the data set.
        num_classes: number of labels.
        train_size: images in the training split.
        test_size: images in the test split.
        read: ``("train" | "test", indices) -> Split`` of those images, in that order.
    """

    name: str
    num_classes: int
    train_size: int
    test_size: int
    read: Callable[[str, np.ndarray], Split]

    def calibration(self, n: int, seed: int = 0) -> Split:
        """Draws ``n`` different training images, the same ones for the same seed.

        Raises:
            InputError: ``n`` is not positive or more than the training split has.
        """
        if not 0 < n <= self.train_size:
            raise InputError(
                f"{n} calibration images asked of {self.name}, "
                f"whose training split has {self.train_size}"
            )
        return self.read("train", np.random.default_rng(seed).permutation(self.train_size)[:n])

    def test(self, limit: int | None = None) -> Split:
        """Reads the test split, or its first ``limit`` images.

        Raises:
            InputError: ``limit`` is not positive or more than the test split has.
        """
        n = self.test_size if limit is None else limit
        if not 0 < n <= self.test_size:
            raise InputError(
                f"{n} test images asked of {self.name}, whose test split has {self.test_size}"
            )
        return self.read("test", np.arange(n))
