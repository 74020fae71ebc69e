"""GLUE as token ids: with the tiny vocabulary of tests/golden, and the real sets where they are."""

import shutil

import numpy as np
import pytest

from aquant_jax import data
from aquant_jax.data import glue
from aquant_jax.data.glue import TASKS, Tokenization
from aquant_jax.errors import InputError
from tests.models.test_bert import TINY

# [PAD] [UNK] [CLS] [SEP] [MASK] good bad a film ##s is .
PAIR = [2, 7, 8, 9, 3, 8, 10, 5, 3]  # [CLS] a film ##s [SEP] film is good [SEP]


def record(task, label=1, first="a films", second="film is good"):
    sentences = dict(zip(TASKS[task].sentences, (first.encode(), second.encode()), strict=False))
    return {**sentences, "label": label}


@pytest.fixture
def prepared(monkeypatch):
    """Every task has these records, and no others."""

    def records(name, folder):
        task = name.removeprefix(glue.PREFIX)
        rows = [record(task, i % 2, first) for i, first in enumerate(["a films", "Bad .", "x"] * 4)]
        return {"train": rows, TASKS[task].validation: rows[:5]}

    monkeypatch.setattr(glue, "open_splits", records)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_padded_tokens_and_labels(task, prepared):
    found = data.load(f"glue/{task}", "nowhere", Tokenization(TINY, 12))
    assert (found.train_size, found.test_size, found.metric) == (12, 5, TASKS[task].metric)
    inputs, labels = found.test()
    first = PAIR if len(TASKS[task].sentences) == 2 else PAIR[:5]
    split = len(PAIR[:5])
    assert inputs["ids"][0].tolist() == first + [0] * (12 - len(first))
    assert inputs["mask"][0].tolist() == [1] * len(first) + [0] * (12 - len(first))
    assert inputs["types"][0].tolist() == [int(split <= i < len(first)) for i in range(12)]
    assert inputs["ids"][1, :4].tolist() == [2, 6, 11, 3]  # in lower case, and punctuation apart
    assert labels.tolist() == [0, 1, 0, 1, 0]
    assert labels.dtype == (np.float32 if task == "stsb" else np.int32)


def test_long_sequences_are_cut(prepared):
    inputs = data.load("glue/rte", "nowhere", Tokenization(TINY, 6)).test().inputs
    assert inputs["ids"].shape == (5, 6)
    assert inputs["mask"][0].all()
    assert (inputs["ids"][0] == 3).sum() == 2  # both separators stay


def test_sentences_apart_are_two_samples(prepared):
    whole = data.load("glue/stsb", "nowhere", Tokenization(TINY, 8, apart=True))
    assert (whole.train_size, whole.test_size) == (24, 10)
    assert whole.metric == "pearson of cosines"
    inputs, labels = whole.test()
    assert inputs["ids"][0, :5].tolist() == PAIR[:5]
    assert inputs["ids"][1, :5].tolist() == [2, *PAIR[5:]]
    assert labels.tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0]
    parts = list(whole.batches(3))
    joined = np.concatenate([part.inputs["ids"] for part in parts])
    np.testing.assert_array_equal(joined, inputs["ids"])


def test_a_draw_is_that_of_its_seed(prepared):
    task = data.load("glue/sst2", "nowhere", Tokenization(TINY, 8))
    one, two, other = (task.calibration(6, seed).inputs["ids"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, two)
    assert np.any(one != other)
    with pytest.raises(InputError, match=r"13 calibration samples asked of glue/sst2, .* has 12"):
        task.calibration(13)


def test_a_tokenizer_file_is_read_too(prepared, tmp_path):
    import tokenizers

    words = tokenizers.BertWordPieceTokenizer(str(TINY / "vocab.txt"))
    words.save(str(tmp_path / "tokenizer.json"))
    one, two = (
        data.load("glue/mrpc", "nowhere", Tokenization(folder, 9)).test().inputs
        for folder in (TINY, tmp_path)
    )
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("glue/wnli", Tokenization(TINY), r"unknown GLUE task 'glue/wnli'; there are cola"),
        ("glue/sst2", None, r"glue/sst2 needs the tokenizer of a checkpoint"),
        ("cifar10", Tokenization(TINY), r"cifar10 is a set of images"),
        ("glue/sst2", Tokenization(TINY, 3), r"max_length is 3; sequences have 4 tokens"),
        ("glue/sst2", Tokenization(TINY, 8, True), r"glue/sst2 scores no similarity"),
        ("glue/mrpc", Tokenization(TINY, 8, True), r"glue/mrpc scores no similarity"),
    ],
)
def test_what_cannot_be_is_named(name, how, message):
    with pytest.raises(InputError, match=message):
        data.load(name, "nowhere", how)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer: no tokenizer.json or vocab.txt"):
        data.load("glue/sst2", "nowhere", Tokenization(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"the tokenizer in .* cannot be read"):
        data.load("glue/sst2", "nowhere", Tokenization(tmp_path))


def test_a_word_that_a_vocabulary_has_no_token_for_is_named(prepared, tmp_path):
    words = (TINY / "vocab.txt").read_text().replace("[UNK]", "unknown").replace("bad", "other")
    (tmp_path / "vocab.txt").write_text(words)
    task = data.load("glue/sst2", "nowhere", Tokenization(tmp_path, 8))
    with pytest.raises(InputError, match=r"the tokenizer cannot read 'a films'\.\.\.: "):
        task.test()


def test_an_unprepared_task_says_how_to_prepare_it(tmp_path):
    pytest.importorskip("tensorflow_datasets", reason="needs aquant-jax[data]")
    with pytest.raises(InputError, match=r"'glue/qqp' is not prepared.*builder\('glue/qqp'"):
        data.load("glue/qqp", tmp_path, Tokenization(TINY))
    (tmp_path / "tensorflow_datasets" / "glue").mkdir(parents=True)
    with pytest.raises(InputError, match=r"'glue/qqp' is not prepared"):
        data.load("glue/qqp", tmp_path, Tokenization(TINY))


@pytest.mark.parametrize(
    ("task", "train", "validation"),
    [("cola", 8551, 1043), ("sst2", 67349, 872), ("mrpc", 3668, 408), ("stsb", 5749, 1500),
     ("rte", 2490, 277), ("qnli", 0, 5463), ("mnli", 0, 9815)],
)  # fmt: skip
def test_the_real_sets_have_their_official_counts(shared_data, tmp_path, task, train, validation):
    shutil.copy(TINY / "vocab.txt", tmp_path)
    found = data.load(f"glue/{task}", shared_data, Tokenization(tmp_path, 16))
    assert (found.train_size, found.test_size) == (train, validation)
    inputs, labels = found.test(4)
    assert inputs["ids"].shape == (4, 16)
    assert set(labels.tolist()) <= set(range(3)) if task != "stsb" else labels.max() <= 5
