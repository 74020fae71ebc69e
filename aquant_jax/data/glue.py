"""GLUE (Wang et al. 2018) through tfds, as token ids: the eight tasks of the paper's Table 2."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aquant_jax.data.source import Dataset, OnCorrupt, Split
from aquant_jax.data.tfds import open_splits, read_record
from aquant_jax.errors import InputError, install_command

PREFIX = "glue/"


class Task(NamedTuple):
    """One task of GLUE.

    Attributes:
        sentences: names of the features that hold its sentences, one or two.
        metric: the metric that the paper reports, a key of `metrics.METRICS`.
        labels: number of classes; 1 is a regression.
        validation: the split to score on.
    """

    sentences: tuple[str, ...]
    metric: str
    labels: int = 2
    validation: str = "validation"


TASKS = {
    "cola": Task(("sentence",), "matthews"),
    "sst2": Task(("sentence",), "accuracy"),
    "mrpc": Task(("sentence1", "sentence2"), "f1"),
    "stsb": Task(("sentence1", "sentence2"), "pearson", 1),
    "qqp": Task(("question1", "question2"), "f1"),
    "mnli": Task(("premise", "hypothesis"), "accuracy", 3, "validation_matched"),
    "qnli": Task(("question", "sentence"), "accuracy"),
    "rte": Task(("sentence1", "sentence2"), "accuracy"),
}


class Tokenization(NamedTuple):
    """The tokenization of sentences.

    Attributes:
        folder: holds ``tokenizer.json`` or ``vocab.txt``.
        max_length: tokens per sequence; sequences are padded or cut to this length.
        apart: the two sentences of a pair become two consecutive samples, for a network that embeds
            sentences; the score compares the cosine of the two embeddings with the label.
    """

    folder: Path
    max_length: int = 128
    apart: bool = False


def load(name: str, tfds_dir: Path, tokenization: Tokenization) -> Dataset:
    """Opens a task.

    Args:
        name: ``glue/TASK``, of `TASKS`.
        tfds_dir: the tfds data directory that holds it prepared as array_record.
        tokenization: the tokenizer of the checkpoint.

    Returns:
        Samples are dicts of int32 ``[N, max_length]``: ``ids``, ``mask`` (zero at padding) and
        ``types`` (the sentence that a token belongs to).

    Raises:
        InputError: unknown task, a missing package, a task that is not prepared, no tokenizer, or
            single sentences that are to be compared.
    """
    task = _task(name, tokenization)
    tokenizer = load_tokenizer(tokenization)
    sources = open_splits(name, tfds_dir)
    splits = {
        "train": sources.get("train", ()),
        "test": sources.get(task.validation, ()),
    }
    each = 2 if tokenization.apart else 1

    def stream(
        split: str, indices: np.ndarray, seed: int, batch_size: int, on_corrupt: OnCorrupt
    ) -> Iterator[Split]:
        for start in range(0, len(indices), batch_size):
            picked = indices[start : start + batch_size]
            try:
                records = [read_record(splits[split], split, int(i) // each) for i in picked]
            except OSError as error:
                raise InputError(
                    f"{name}: {error.filename} cannot be read: {error.strerror}"
                ) from error
            labels = np.array([record["label"] for record in records], _label_type(task))
            sides = picked % each if tokenization.apart else None
            yield Split(_encode(tokenizer, task, records, sides), labels)

    train_size, test_size = (each * len(splits[split]) for split in ("train", "test"))
    metric = f"{task.metric} of cosines" if tokenization.apart else task.metric
    labels = 0 if tokenization.apart else task.labels
    return Dataset(name, labels, train_size, test_size, stream, metric)


def _task(name: str, tokenization: Tokenization) -> Task:
    """The task called `name`; InputError if it is unknown or does not fit the tokenization."""
    task = TASKS.get(name.removeprefix(PREFIX))
    if task is None:
        raise InputError(f"unknown GLUE task {name!r}; there are {', '.join(TASKS)}")
    if tokenization.apart and (len(task.sentences) != 2 or task.labels != 1):
        raise InputError(f"{name} scores no similarity of two sentences, as glue/stsb does")
    return task


def load_tokenizer(tokenization: Tokenization) -> Any:
    """The tokenizer of a checkpoint, which pads or cuts to ``tokenization.max_length``.

    Raises:
        InputError: tokenizers is not installed, there is no tokenizer, or a length is too short.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(f"GLUE needs tokenizers: {install_command('glue')}") from error
    if tokenization.max_length < 4:  # [CLS] a [SEP] b would lose b
        raise InputError(
            f"max_length is {tokenization.max_length}; sequences have 4 tokens or more"
        )
    if not tokenization.folder.is_dir():
        raise InputError(f"there is no checkpoint in {tokenization.folder}: no such folder")
    saved, words = tokenization.folder / "tokenizer.json", tokenization.folder / "vocab.txt"
    try:
        if saved.is_file():
            tokenizer: Any = tokenizers.Tokenizer.from_file(str(saved))
        elif words.is_file():
            lower = _lower_case(tokenization.folder)
            tokenizer = tokenizers.BertWordPieceTokenizer(str(words), lowercase=lower)
        else:
            raise InputError(
                f"{tokenization.folder} has no tokenizer: no tokenizer.json or vocab.txt in it"
            )
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare exceptions
        raise InputError(
            f"the tokenizer in {tokenization.folder} cannot be read: {error}"
        ) from error
    pad = tokenizer.token_to_id("[PAD]")
    tokenizer.enable_truncation(tokenization.max_length)
    tokenizer.enable_padding(length=tokenization.max_length, pad_id=pad or 0)
    return tokenizer


def _lower_case(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text()).get("do_lower_case", True) if path.is_file() else True


def _label_type(task: Task) -> type[np.number]:
    return np.float32 if task.labels == 1 else np.int32


def _encode(
    tokenizer: Any, task: Task, records: Sequence[Any], sides: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Token arrays of the records; `sides` selects one sentence of each pair."""
    texts = [[record[feature].decode() for feature in task.sentences] for record in records]
    if sides is not None:
        texts = [[pair[side]] for pair, side in zip(texts, sides, strict=True)]
    try:
        encodings = tokenizer.encode_batch([t[0] if len(t) == 1 else tuple(t) for t in texts])
    except Exception as error:  # a vocabulary without [UNK]
        raise InputError(
            f"the tokenizer cannot read {' | '.join(texts[0])!r}...: {error}"
        ) from error
    columns = {
        "ids": [e.ids for e in encodings],
        "mask": [e.attention_mask for e in encodings],
        "types": [e.type_ids for e in encodings],
    }
    return {name: np.array(rows, np.int32) for name, rows in columns.items()}
