import jax.numpy as jnp
import numpy as np
import pytest

from aquant_jax.errors import InputError
from aquant_jax.evaluate import evaluate, label_ranks


def random_logits(n=23, classes=10):
    return np.random.default_rng(0).normal(size=(n, classes)).astype(np.float32)


def test_agrees_with_sorting_for_every_batch_size():
    logits = random_logits()
    labels = np.random.default_rng(1).integers(0, 10, 23)
    best = np.argsort(-logits, axis=1)
    expected = {
        "top1": 100 * np.mean(best[:, 0] == labels),
        "top5": 100 * np.mean(np.any(best[:, :5] == labels[:, None], axis=1)),
    }
    for batch_size in (1, 5, 22, 23, 100):
        metrics = evaluate(lambda x: x, logits, labels, batch_size)
        assert metrics == pytest.approx(expected)


def test_compiles_once():
    traces = []

    def predict(x):
        traces.append(x.shape)
        return x

    evaluate(predict, random_logits(), np.zeros(23, int), batch_size=5)
    assert traces == [(5, 10)]


def test_padding_is_not_counted():
    logits = np.eye(10, dtype=np.float32)[[0, 0, 3]]
    assert evaluate(lambda x: x, logits, np.array([1, 1, 3]), 2)["top1"] == pytest.approx(100 / 3)


def test_few_classes_have_no_top5():
    assert set(evaluate(lambda x: x, random_logits(classes=5), np.zeros(23, int))) == {"top1"}


def test_ties_go_to_the_lower_class_and_nan_is_wrong():
    ranks, _ = label_ranks(np.zeros((2, 3), np.float32), np.array([0, 2]))
    assert list(ranks) == [0, 2]
    metrics = evaluate(lambda x: x * jnp.nan, random_logits(), np.zeros(23, int))
    assert metrics == {"top1": 0.0, "top5": 0.0}


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((0, 3)), np.zeros(0, int), "0 images"),
        (np.zeros((4, 3)), np.zeros(5, int), r"4 images with labels of \(5,\)"),
        (np.zeros((4, 3)), np.full(4, 3), "3 classes"),
        (np.zeros((4, 3, 2)), np.zeros(4, int), r"\(4, 3, 2\)"),
    ],
)
def test_wrong_input(images, labels, message):
    with pytest.raises(InputError, match=message):
        evaluate(lambda x: x, images.astype(np.float32), labels)


def test_wrong_batch_size():
    with pytest.raises(InputError, match="batch_size is 0"):
        evaluate(lambda x: x, random_logits(), np.zeros(23, int), 0)
