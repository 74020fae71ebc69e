"""Metrics over batches."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from aquant_jax.errors import InputError

TOP_K = (1, 5)
Predict = Callable[[Any], Any]


def evaluate(
    predict: Predict,
    images: np.ndarray,
    labels: np.ndarray,
    batch_size: int = 250,
) -> dict[str, float]:
    """Scores a classifier on images in memory.

    Args:
        predict: as ``evaluate_batches`` takes it.
        images: [N, ...].
        labels: [N] integers in 0 .. classes - 1.
        batch_size: images a call.

    Returns:
        What ``evaluate_batches`` returns.

    Raises:
        InputError: as ``evaluate_batches``, as many labels as images not given, or a batch size
            below 1.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if labels.shape != (len(images),):
        raise InputError(f"cannot score {len(images)} images with labels of {labels.shape}")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, must be at least 1")
    slices = [slice(start, start + batch_size) for start in range(0, len(images), batch_size)]
    return evaluate_batches(predict, ((images[part], labels[part]) for part in slices))


def evaluate_batches(
    predict: Predict,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    num_classes: int | None = None,
) -> dict[str, float]:
    """Scores a classifier on batches, of which it holds no more than two.

    Args:
        predict: images [batch, ...] -> logits [batch, classes]; compiled once, as smaller
            batches are padded to the size of the first and their padding not counted.
        batches: images [n, ...] and their labels [n], integers in 0 .. classes - 1.
        num_classes: how many the labels are of, if it must be as many as the logits have.

    Returns:
        ``{"top1": percent, "top5": percent, "images": count}``, top-5 only with more than five
        classes.

    Raises:
        InputError: no images, another number of classes, a label out of range, or logits of
            another shape.
    """
    ranks, classes = [], 0
    for logits, labels in _predicted(predict, batches):
        rank, classes = label_ranks(np.asarray(logits), labels)
        if num_classes not in (None, classes):
            raise InputError(f"the network tells {classes} classes apart, the data {num_classes}")
        ranks.append(rank)
    if not ranks:
        raise InputError("cannot score 0 images")
    rank = np.concatenate(ranks)
    scores = {f"top{k}": 100.0 * float(np.mean(rank < k)) for k in TOP_K if k == 1 or k < classes}
    return {**scores, "images": len(rank)}


def _predicted(
    predict: Predict, batches: Iterable[tuple[np.ndarray, np.ndarray]]
) -> Iterator[tuple[Any, np.ndarray]]:
    """Hands logits out one batch late: the device has the next while the host waits for them."""
    compiled = jax.jit(lambda batch: predict(batch))  # predict itself need not be hashable
    size, started = 0, None
    for images, labels in batches:
        size = size or len(images)
        latest = compiled(pad(images, size)), labels
        if started is not None:
            yield started
        started = latest
    if started is not None:
        yield started


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
