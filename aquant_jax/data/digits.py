"""The embedded set: scikit-learn's 1,797 handwritten digits, 8x8, no download.

References:
    E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998), its test
    part, as scikit-learn bundles it.
"""

from typing import Any

import numpy as np

from aquant_jax.data.source import Dataset, Split, in_memory
from aquant_jax.errors import InputError

TRAIN_SIZE = 1297
SPLIT_SEED = 0
_MAX_PIXEL = 16.0


def load() -> Dataset:
    """Splits the digits once and for all into 1,297 to train and calibrate and 500 held out.

    Returns:
        Images [N, 8, 8, 1] in [0, 1].

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("the digits need scikit-learn: pip install 'aquant-jax[demo]'") from error
    bunch: Any = load_digits()
    # Shuffled: the held-out digits are other images, but not digits of other writers.
    order = np.random.default_rng(SPLIT_SEED).permutation(len(bunch.target))
    images = (bunch.images[order, :, :, None] / _MAX_PIXEL).astype(np.float32)
    labels = bunch.target[order].astype(np.int32)
    train = Split(images[:TRAIN_SIZE], labels[:TRAIN_SIZE])
    return in_memory("digits", 10, train, Split(images[TRAIN_SIZE:], labels[TRAIN_SIZE:]))
