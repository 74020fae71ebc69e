import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquant_jax.errors import InputError
from launch.lib.metrics import compare_batches, evaluate, evaluate_batches, label_ranks


def random_logits(n=23, classes=10):
    return np.random.default_rng(0).normal(size=(n, classes)).astype(np.float32)


def test_agrees_with_sorting_for_every_batch_size():
    logits = random_logits()
    labels = np.random.default_rng(1).integers(0, 10, 23)
    best = np.argsort(-logits, axis=1)
    expected = {
        "top1": 100 * np.mean(best[:, 0] == labels),
        "top5": 100 * np.mean(np.any(best[:, :5] == labels[:, None], axis=1)),
        "samples": 23,
    }
    for batch_size in (1, 5, 22, 23, 100):
        metrics = evaluate(lambda x: x, logits, labels, batch_size)
        assert metrics == pytest.approx(expected)


def test_networks_are_compared_without_labels():
    """The last batch is padded, which is not counted."""
    logits = random_logits(classes=4)
    batches = [(logits[start : start + 10], np.zeros(10)[: 23 - start]) for start in (0, 10, 20)]
    factors = np.array([[1.0, 0.1, 1.0, 1.0]], np.float32)
    found = compare_batches(lambda x: x, lambda x: x * jnp.asarray(factors), batches)
    other = logits * factors
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (logits, other))
    same = np.mean(logits.argmax(1) == other.argmax(1))
    assert 0.5 < same < 1
    expected = {
        "agreement": 100 * same,
        "divergence": np.mean(np.sum(p * np.log(p / q), axis=1)),
        "samples": 23,
    }
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda x: x[:, :3], r"gives \(23, 4\) and the quantized one \(23, 3\); both must give"),
        (lambda x: x * np.nan, "a network gives values that are NaN or infinite"),
    ],
)
def test_networks_that_cannot_be_compared_are_an_error(network, message):
    logits = random_logits(classes=4)
    with pytest.raises(InputError, match=message):
        compare_batches(lambda x: x, network, [(logits, np.zeros(23))])


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
    assert set(evaluate(lambda x: x, random_logits(classes=5), np.zeros(23, int))) == {
        "top1",
        "samples",
    }


def test_ties_go_to_the_lower_class_and_nan_is_wrong():
    ranks, _ = label_ranks(np.zeros((2, 3), np.float32), np.array([0, 2]))
    assert list(ranks) == [0, 2]
    metrics = evaluate(lambda x: x * jnp.nan, random_logits(), np.zeros(23, int))
    assert metrics == {"top1": 0.0, "top5": 0.0, "samples": 23}


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((0, 3)), np.zeros(0, int), "0 samples"),
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


def test_streamed_batches_of_any_sizes_score_as_one_array():
    logits = random_logits()
    labels = np.random.default_rng(1).integers(0, 10, 23)
    sizes = []

    def predict(x):
        sizes.append(len(x))
        return x

    batches = ((logits[part], labels[part]) for part in (slice(8), slice(8, 16), slice(16, 23)))
    metrics = evaluate_batches(predict, batches, num_classes=10)
    assert metrics == evaluate(lambda x: x, logits, labels)
    assert sizes == [8]


def test_a_batch_is_read_only_when_it_is_needed():
    read, scored = [], []

    def batches():
        for number in range(6):
            read.append(number)
            yield np.eye(10, dtype=np.float32), np.arange(10)

    def score(logits):
        scored.append(logits)
        assert len(read) <= len(scored) + 1
        return logits

    evaluate_batches(lambda x: jax.pure_callback(score, x, x, vmap_method="sequential"), batches())
    assert len(scored) == 6


@pytest.mark.parametrize(
    ("batches", "classes", "message"),
    [
        ([], 10, "0 samples"),
        ([(random_logits(), np.zeros(23, int))], 12, "10 classes apart, the data 12"),
        ([(random_logits(), np.full(23, -1))], 10, "labels from -1 to -1 do not fit 10"),
    ],
)
def test_wrong_batches(batches, classes, message):
    with pytest.raises(InputError, match=message):
        evaluate_batches(lambda x: x, batches, classes)


class TestMetrics:
    """Against their definitions, on answers that are neither all right nor all wrong."""

    def scores(self, metric, outputs, labels, **options):
        batches = [(outputs[i : i + 4], labels[i : i + 4]) for i in range(0, len(labels), 4)]
        return evaluate_batches(lambda x: x, batches, metric=metric, **options)

    def confusion(self):
        logits = random_logits(classes=2)
        labels = (np.arange(23) % 3 > 0).astype(np.int32)
        said = logits.argmax(1)
        pairs = [(1, 1), (0, 0), (1, 0), (0, 1)]
        return logits, labels, [np.sum((said == s) & (labels == t)) for s, t in pairs]

    def test_accuracy(self):
        logits, labels, (tp, tn, _, _) = self.confusion()
        found = self.scores("accuracy", logits, labels, num_classes=2)
        assert found == {"accuracy": pytest.approx(100 * (tp + tn) / 23), "samples": 23}

    def test_f1(self):
        logits, labels, (tp, _, fp, fn) = self.confusion()
        found = self.scores("f1", logits, labels)
        assert found["f1"] == pytest.approx(100 * 2 * tp / (2 * tp + fp + fn))

    def test_matthews(self):
        logits, labels, (tp, tn, fp, fn) = self.confusion()
        root = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
        found = self.scores("matthews", logits, labels)
        assert found["matthews"] == pytest.approx(100 * (tp * tn - fp * fn) / root)

    def test_pearson(self):
        rng = np.random.default_rng(0)
        labels = rng.normal(size=23).astype(np.float32)
        outputs = (labels + rng.normal(size=23)).astype(np.float32)[:, None]
        found = self.scores("pearson", outputs, labels, num_classes=1)
        assert found["pearson"] == pytest.approx(100 * np.corrcoef(outputs[:, 0], labels)[0, 1])

    def test_pearson_of_cosines(self):
        rng = np.random.default_rng(0)
        labels = np.repeat(rng.normal(size=11), 2).astype(np.float32)
        vectors = rng.normal(size=(22, 5)).astype(np.float32)
        cosines = [
            a @ b / np.sqrt(a @ a * (b @ b))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        found = self.scores("pearson of cosines", vectors, labels)
        wanted = 100 * np.corrcoef(cosines, labels[::2])[0, 1]
        assert found["pearson of cosines"] == pytest.approx(wanted, rel=1e-5)

    def test_equal_outputs_correlate_with_nothing(self):
        labels = np.arange(8, dtype=np.float32)
        assert self.scores("pearson", np.ones((8, 1), np.float32), labels)["pearson"] == 0
        zeros = np.zeros((8, 3), np.float32)
        assert self.scores("pearson of cosines", zeros, labels)["pearson of cosines"] == 0

    @pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
    @pytest.mark.parametrize("label", [-1, 2])
    def test_a_label_out_of_range_is_named(self, metric, label):
        labels = np.array([0, 1, label, 1], np.int32)
        with pytest.raises(InputError, match=f"a label is {label}, not one of 0 to 1"):
            self.scores(metric, np.eye(2, dtype="f")[[0, 1, 0, 1]], labels)

    def test_f1_without_any_positive_is_zero(self):
        logits = np.tile(np.float32([[1, 0]]), (4, 1))
        assert self.scores("f1", logits, np.zeros(4, np.int32))["f1"] == 0

    def test_an_odd_number_of_sentences_is_no_pairs(self):
        vectors, labels = np.ones((5, 3), np.float32), np.arange(5, dtype=np.float32)
        with pytest.raises(InputError, match="5 sentences are no pairs"):
            self.scores("pearson of cosines", vectors, labels)

    def test_inputs_may_be_a_pytree(self):
        logits, labels, (tp, tn, _, _) = self.confusion()
        batches = [({"a": logits[i : i + 4]}, labels[i : i + 4]) for i in range(0, 23, 4)]
        found = evaluate_batches(lambda x: x["a"], batches, metric="accuracy")
        assert found["accuracy"] == pytest.approx(100 * (tp + tn) / 23)

    @pytest.mark.parametrize(
        ("metric", "outputs", "options", "message"),
        [
            (
                "bleu",
                np.zeros((4, 2), np.float32),
                {},
                r"unknown metric 'bleu'; there are top1, acc",
            ),
            ("f1", np.zeros((4, 2), np.float32), {"num_classes": 3}, r"\(2,\) values.*needs 3"),
            ("f1", np.full((4, 2), np.nan, np.float32), {}, r"NaN or infinite"),
        ],
    )
    def test_wrong_input(self, metric, outputs, options, message):
        with pytest.raises(InputError, match=message):
            self.scores(metric, outputs, np.zeros(4, np.int32), **options)
