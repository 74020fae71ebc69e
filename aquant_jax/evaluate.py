"""Metrics over batches."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from aquant_jax.errors import InputError

TOP_K = (1, 5)


def evaluate(
    predict: Callable[[Any], Any],
    images: np.ndarray,
    labels: np.ndarray,
    batch_size: int = 250,
) -> dict[str, float]:
    """Scores a classifier.

    Args:
        predict: images [batch_size, ...] -> logits [batch_size, classes]; compiled once, as
            the last batch is padded to the full size and its padding not counted.
        images: [N, ...].
        labels: [N] integers in 0 .. classes - 1.
        batch_size: images a call.

    Returns:
        ``{"top1": percent, "top5": percent}``, top-5 only with more than five classes.

    Raises:
        InputError: no images, as many labels as images not given, a label out of range, or
            logits of another shape.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if len(images) == 0 or labels.shape != (len(images),):
        raise InputError(f"cannot score {len(images)} images with labels of {labels.shape}")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, must be at least 1")
    batch_size = min(batch_size, len(images))
    compiled = jax.jit(lambda batch: predict(batch))  # predict itself need not be hashable
    ranks = [
        label_ranks(
            np.asarray(compiled(pad(images[start : start + batch_size], batch_size))),
            labels[start : start + batch_size],
        )
        for start in range(0, len(images), batch_size)
    ]
    rank = np.concatenate([batch for batch, _ in ranks])
    classes = ranks[0][1]
    return {f"top{k}": 100.0 * float(np.mean(rank < k)) for k in TOP_K if k == 1 or k < classes}


def pad(batch: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last row of [n, ...] up to [size, ...]; real data keeps statistics sane."""
    return np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])


def label_ranks(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, int]:
    """How many classes beat the right one, for the first ``len(labels)`` rows.

    Args:
        logits: [batch, classes], batch >= n.
        labels: [n].

    Returns:
        Ranks [n], 0 for a correct top-1, and the number of classes. Ties go to the lower
        class, as argmax has it; a NaN among the logits of an image ranks its label last.
    """
    if logits.ndim != 2 or len(logits) < len(labels):
        raise InputError(f"logits must be [batch, classes], not of shape {logits.shape}")
    classes = logits.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"labels from {labels.min()} to {labels.max()} do not fit {classes} classes"
        )
    logits = logits[: len(labels)].astype(np.float32)
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    tied_before = (logits == own) & (np.arange(classes) < labels[:, None])
    rank = np.sum((logits > own) | tied_before, axis=1)
    return np.where(np.isnan(logits).any(axis=1), classes, rank), classes
