"""TensorFlow Datasets through their random-access sources, without TensorFlow."""

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from aquant_jax.data.preprocess import Preprocessing
from aquant_jax.data.records import NONE, Record, Records, dataset
from aquant_jax.data.source import Dataset
from aquant_jax.errors import InputError, install_command, reason

SETS = (
    *("cifar10", "cifar10_jpeg", "imagenet2012", "imagenet_v2"),
    *("imagenet_val_1300", "imagenet_sample_1000"),
)
TEST_SPLITS = ("validation", "test")
_PREPARE = (
    "python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', "
    "data_dir='{folder}', file_format='array_record').download_and_prepare()\""
)
_MANUAL = {
    "imagenet2012": "put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (image-net.org, by "
    "hand) into the manual_dir {folder}/downloads/manual, then ",
}


def load(
    name: str,
    tfds_dir: Path,
    preprocessing: Preprocessing,
    test_split: str | None = None,
) -> Dataset:
    """Opens any image classification set of tfds, or one that has its format.

    Args:
        name: the tfds name, such as imagenet2012 or imagenet_v2/matched-frequency.
        tfds_dir: the tfds data directory that holds it prepared as array_record.
        preprocessing: that of the checkpoint.
        test_split: to score on; by default validation, or test where there is none.

    Raises:
        InputError: tfds is not installed, the data set is not prepared there or has no such
            split, or its records are not labelled images.
    """
    # One decoder for all sets gives the same pixels everywhere: tfds uses OpenCV if installed.
    sources = open_splits(name, tfds_dir, skip=("image",))
    if test_split is not None and test_split not in sources:
        raise InputError(f"{name} has no split {test_split!r}; there are {', '.join(sources)}")
    names = (test_split,) if test_split else TEST_SPLITS
    test = next((split for split in names if split in sources), None)
    features = dict(next(iter(sources.values())).dataset_info.features.items())
    classes = getattr(features.get("label"), "num_classes", None)
    if "image" not in features or classes is None:
        raise InputError(
            f"{name} is not an image classification set: it has {', '.join(features)}, "
            "not an image and the label of a class"
        )
    train = _records(sources["train"], "train") if "train" in sources else NONE
    held_out = _records(sources[test], test) if test else NONE
    return dataset(name, classes, train, held_out, preprocessing)


def _records(source: Any, split: str) -> Records:
    def read(index: int) -> Record:
        record = read_record(source, split, index)
        stored = record.get("file_name")
        name = stored.decode() if stored else f"number {index} of {split}"
        return Record(name, record["image"], record["label"])

    return Records(len(source), read)


def read_record(source: Any, split: str, index: int) -> Any:
    """One record of a split.

    Raises:
        OSError: the file that holds it is damaged.
    """
    try:
        return source[index]
    except (RuntimeError, ValueError) as error:  # of array_record, and of a record's own format
        raise OSError(errno.EIO, reason(error), f"number {index} of {split}") from error


def open_splits(name: str, tfds_dir: Path, skip: Sequence[str] = ()) -> dict[str, Any]:
    """Random access to the records of every split.

    Args:
        name: the tfds name.
        tfds_dir: the tfds data directory.
        skip: features that are left encoded.

    Raises:
        InputError: tfds is not installed, or the data set is not prepared there.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(f"{name} needs tensorflow-datasets: {install_command('data')}") from error
    base = name.partition("/")[0].partition(":")[0]
    if not (tfds_dir / base).is_dir():
        # Checked before tfds, which would log a warning.
        raise InputError(_not_prepared(name, base, tfds_dir, _in_catalogue(base)))
    decoders = {feature: tfds.decode.SkipDecoding() for feature in skip} or None
    try:
        # tfds raises various types for a data set that is missing.
        opened = tfds.data_source(name, data_dir=str(tfds_dir), decoders=decoders, download=False)
    except Exception as error:
        text = _not_prepared(name, base, tfds_dir, _in_catalogue(base))
        raise InputError(f"{text} (tfds says: {reason(error)})") from error
    return cast(dict[str, Any], opened)  # without a split, tfds gives a dict of all


def _in_catalogue(base: str) -> bool:
    import tensorflow_datasets as tfds

    try:
        tfds.builder_cls(base)
    except ValueError:  # its DatasetNotFoundError is one
        return False
    return True


def _not_prepared(name: str, base: str, folder: Path, known: bool) -> str:
    start = f"data set {name!r} is not prepared as array_record in {folder}"
    if not known:
        return (
            f"{start}, and not in the public tfds catalogue: copy its prepared folder there, or "
            f"name digits, folder:PATH or another set of tfds, such as {', '.join(SETS)}"
        )
    manual = _MANUAL.get(base, "").format(folder=folder)
    command = _PREPARE.format(name=name, folder=folder)
    return f"{start}; {manual}prepare it with (tensorflow is needed for this step only): {command}"
