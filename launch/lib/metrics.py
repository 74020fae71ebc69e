"""Metrics over batches."""

import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aquant_jax import models
from aquant_jax.errors import InputError, install_command, reason
from aquant_jax.reconstruction.devices import put, read

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


def float_network(apply: models.Apply, variables: Any, model: str, dataset: str) -> Predict:
    """A network to be scored, for which inputs that it cannot take are an InputError.

    Args:
        apply, variables: the network.
        model, dataset: their names.
    """

    def predict(inputs: Any) -> Any:
        try:
            return apply(variables, inputs)
        except (TypeError, ValueError, FlaxError) as error:
            shapes = ", ".join(str(leaf.shape) for leaf in jax.tree.leaves(inputs))
            raise InputError(
                f"{model} does not take the inputs of {dataset}, of shape {shapes}: {reason(error)}"
            ) from error

    return predict


def evaluate_batches(
    predict: Predict,
    batches: Iterable[tuple[Any, np.ndarray]],
    num_classes: int | None = None,
    metric: str = "top1",
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Scores a network on batches, of which it holds no more than two.

    Args:
        predict: inputs, a pytree of [batch, ...] -> logits [batch, classes] (or what the metric
            takes); compiled once, as smaller batches are padded to the size of the first and their
            padding not counted.
        batches: inputs [n, ...] and their labels [n], integers in 0 .. classes - 1.
        num_classes: how many the labels are of, if it must be as many as the logits have.
        metric: ``top1``, or a key of `METRICS`.
        mesh: devices to split the samples of a batch over, all of them, whatever their axis.

    Returns:
        ``{"top1": percent, "top5": percent, "samples": count}``, top-5 only with more than five
        classes; of another metric ``{metric: percent, "samples": count}``.

    Raises:
        InputError: nothing to score, another number of classes, a label out of range, or logits of
            another shape.
    """
    if metric != "top1":
        return _evaluate_metric(_predicted(predict, batches, mesh), num_classes, metric)
    ranks, classes = [], 0
    for logits, labels in _predicted(predict, batches, mesh):
        rank, classes = label_ranks(np.asarray(logits), labels)
        if num_classes not in (None, classes):
            raise InputError(f"the network tells {classes} classes apart, the data {num_classes}")
        ranks.append(rank)
    if not ranks:
        raise InputError("cannot score 0 samples")
    rank = np.concatenate(ranks)
    scores = {f"top{k}": 100.0 * float(np.mean(rank < k)) for k in TOP_K if k == 1 or k < classes}
    return {**scores, "samples": len(rank)}


def compare_batches(
    reference: Predict,
    predict: Predict,
    batches: Iterable[tuple[Any, np.ndarray]],
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """How near a network's classes are to those of another; labels have no part in it.

    Args:
        reference: as `predict` of ``evaluate_batches``, the network to compare with.
        predict: the network that is compared.
        batches, mesh: see ``evaluate_batches``.

    Returns:
        ``{"agreement": percent of the samples with the same class, "divergence": nats,
        "samples": count}``; the divergence is the mean of KL(reference || predict).

    Raises:
        InputError: nothing to compare, or outputs that are not logits [batch, classes] of as many
            classes, two or more.
    """

    def both(inputs: Any) -> jax.Array:
        found = [jnp.asarray(network(inputs)) for network in (reference, predict)]
        shapes = [tuple(output.shape) for output in found]
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][1] < 2:
            raise InputError(
                f"the float network gives {shapes[0]} and the quantized one {shapes[1]}; both "
                f"must give logits of the same classes"
            )
        return jnp.stack([output.astype(np.float32) for output in found], axis=1)

    samples, same, divergence = 0, 0, 0.0
    for logits, labels in _predicted(both, batches, mesh):
        logits = np.asarray(logits)[: len(labels)]
        if not np.isfinite(logits).all():
            raise InputError("a network gives values that are NaN or infinite")
        first, second = np.moveaxis(np.asarray(jax.nn.log_softmax(logits)), 1, 0)
        same += int(np.sum(first.argmax(-1) == second.argmax(-1)))
        divergence += float(np.sum(np.exp(first) * (first - second)))
        samples += len(logits)
    if not samples:
        raise InputError("cannot compare networks on 0 samples")
    return {
        "agreement": 100.0 * same / samples, "divergence": divergence / samples, "samples": samples
    }  # fmt: skip


def _evaluate_metric(
    batches: Iterable[tuple[Any, np.ndarray]], num_classes: int | None, metric: str
) -> dict[str, float]:
    """`evaluate_batches` for a metric that needs all outputs, of batches and labels, at once."""
    if metric not in METRICS:
        raise InputError(f"unknown metric {metric!r}; there are top1, {', '.join(METRICS)}")
    predicted = [(np.asarray(out)[: len(y)], y) for out, y in batches]
    if not predicted:
        raise InputError("cannot score 0 samples")
    outputs, labels = (np.concatenate(parts) for parts in zip(*predicted, strict=True))
    if num_classes and outputs.shape[1:] != (num_classes,):
        raise InputError(
            f"the network gives {outputs.shape[1:]} values a sample; the data needs {num_classes}"
        )
    if not np.isfinite(outputs).all():
        raise InputError("the network gives values that are NaN or infinite")
    classes = outputs.shape[-1] if np.issubdtype(labels.dtype, np.integer) else None
    if classes and (wrong := labels[(labels < 0) | (labels >= classes)]).size:
        raise InputError(f"a label is {wrong[0]}, not one of 0 to {classes - 1}")
    return {metric: 100.0 * float(METRICS[metric](outputs, labels)), "samples": len(labels)}


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(logits.argmax(1) == labels))


def _f1(logits: np.ndarray, labels: np.ndarray) -> float:
    metrics = _library("sklearn.metrics")
    return float(metrics.f1_score(labels, logits.argmax(1), zero_division=0.0))


def _matthews(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(_library("sklearn.metrics").matthews_corrcoef(labels, logits.argmax(1)))


def _pearson(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Zero where the outputs are all equal."""
    if np.ptp(outputs) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(_library("scipy.stats").pearsonr(outputs[:, 0], labels).statistic)


def _pearson_of_cosines(embeddings: np.ndarray, labels: np.ndarray) -> float:
    """Of sentences that come in pairs, one after the other."""
    if len(embeddings) % 2:
        raise InputError(f"{len(embeddings)} sentences are no pairs; score an even number of them")
    one, two = embeddings[::2], embeddings[1::2]
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    cosines = np.sum(one * two, axis=1) / np.maximum(norms, np.finfo(np.float32).tiny)
    return _pearson(cosines[:, None], labels[::2])


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "pearson of cosines": _pearson_of_cosines,
}


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"the metric needs {name}: {install_command('glue')}") from error


def _predicted(
    predict: Predict, batches: Iterable[tuple[Any, np.ndarray]], mesh: Mesh | None
) -> Iterator[tuple[Any, np.ndarray]]:
    """Hands logits out one batch late: the device has the next while the host waits for them."""
    compiled = jax.jit(lambda batch: predict(batch))  # predict itself need not be hashable
    size, started, devices = 0, None, mesh.size if mesh else 1
    for inputs, labels in batches:
        size = size or devices * math.ceil(len(labels) / devices)
        padded = jax.tree.map(lambda leaf, size=size: pad(leaf, size), inputs)
        if mesh is not None:
            padded = put(padded, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
        latest = compiled(padded), labels
        if started is not None:
            yield read(started[0]), started[1]
        started = latest
    if started is not None:
        yield read(started[0]), started[1]


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
    right = np.take_along_axis(logits, labels[:, None], axis=1)
    tied_before = (logits == right) & (np.arange(classes) < labels[:, None])
    rank = np.sum((logits > right) | tied_before, axis=1)
    return np.where(np.isnan(logits).any(axis=1), classes, rank), classes
