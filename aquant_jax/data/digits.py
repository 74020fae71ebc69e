"""The embedded set: 1,797 handwritten digits of 8x8 pixels, in ``digits.npz``, no download.

References:
    E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998; CC BY 4.0), its
    test part, in the order of scikit-learn's ``load_digits``.
"""

from pathlib import Path

import numpy as np

from aquant_jax.data.source import Dataset, Split, in_memory

TRAIN_SIZE = 1297
SPLIT_SEED = 0
_FILE = Path(__file__).with_name("digits.npz")
_MAX_PIXEL = 16.0


def load() -> Dataset:
    """Splits the digits once and for all into 1,297 to train and calibrate and 500 held out.

    Returns:
        Images [N, 8, 8, 1] in [0, 1].
    """
    with np.load(_FILE) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    # Shuffled: the held-out digits are other images, but not digits of other writers.
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    images = (images[order, :, :, None] / _MAX_PIXEL).astype(np.float32)
    labels = labels[order].astype(np.int32)
    train = Split(images[:TRAIN_SIZE], labels[:TRAIN_SIZE])
    return in_memory("digits", 10, train, Split(images[TRAIN_SIZE:], labels[TRAIN_SIZE:]))
