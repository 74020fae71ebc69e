"""Images in class folders: labels, draws, and what goes wrong with files."""

import io
import os
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from aquant_jax import data
from aquant_jax.data.records import NONE, Record, Records, dataset
from aquant_jax.errors import InputError

SMALL = data.Preprocessing(size=16, resize=20)
CLASSES = ("cat", "ant", "bee")


def picture(value=0, size=(33, 25), kind="JPEG"):
    rng = np.random.default_rng(value)
    stored = io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
    coarse.resize(size).save(stored, kind)
    return stored.getvalue()


@pytest.fixture
def root(tmp_path):
    """Ten training and four test images of each of three classes."""
    for split, number in (("train", 10), ("val", 4)):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                suffix = "JPEG" if index % 2 else "png"
                stored = picture(100 * label + index + number, kind=suffix.upper())
                (folder / f"{index}.{suffix}").write_bytes(stored)
            (folder / "notes.txt").touch()
    return tmp_path / "pets"


def load(root, how=SMALL):
    return data.load(f"folder:{root.name}", root.parent, how)


def test_labels_are_the_places_of_the_sorted_class_names(root):
    pets = load(root)
    assert (pets.num_classes, pets.train_size, pets.test_size) == (3, 30, 12)
    assert np.bincount(pets.test().labels).tolist() == [4, 4, 4]
    for name in ("cat", "bee"):
        for file in (root / "val" / name).iterdir():
            file.write_bytes(picture(7))
    images, labels = pets.test()
    ants = [image.tobytes() for image in images[labels == 0]]
    assert len(set(ants)) == 4
    assert len({image.tobytes() for image in images[labels > 0]}) == 1


def test_the_first_images_are_not_all_of_the_first_class(root):
    assert len(set(load(root).test(4).labels.tolist())) > 1


def test_paths_may_be_absolute(root):
    assert data.load(f"folder:{root}", "/nonexistent", SMALL).test_size == 12


def test_batches_hold_every_image_once_and_only_the_last_is_smaller(root):
    pets = load(root)
    batches = list(pets.batches(5))
    assert [len(batch.labels) for batch in batches] == [5, 5, 2]
    whole = pets.test()
    np.testing.assert_array_equal(np.concatenate([b.inputs for b in batches]), whole.inputs)
    np.testing.assert_array_equal(np.concatenate([b.labels for b in batches]), whole.labels)
    assert whole.inputs.shape == (12, 16, 16, 3)
    assert len({image.tobytes() for image in whole.inputs}) == 12


def test_calibration_images_are_the_same_whoever_decodes_them(root, monkeypatch):
    pets = load(root)
    first, other = pets.calibration(20, seed=5), pets.calibration(20, seed=6)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    again = pets.calibration(20, seed=5)
    np.testing.assert_array_equal(first.inputs, again.inputs)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert np.any(first.inputs != other.inputs)
    assert first.inputs.shape == (20, 16, 16, 3)


def test_calibration_takes_another_crop_of_an_image_for_another_seed(root):
    one = {x.tobytes() for x in load(root).calibration(30, seed=0).inputs}
    two = {x.tobytes() for x in load(root).calibration(30, seed=1).inputs}
    assert len(one) == len(two) == 30
    assert not one & two


def test_more_calibration_images_than_there_are(root):
    with pytest.raises(InputError, match=r"31 calibration samples .* has 30"):
        load(root).calibration(31)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda _: b"", lambda _: b"abc"])
def test_a_corrupt_image_is_named_and_left_out_only_if_asked(root, damage):
    bad = root / "val" / "bee" / "3.JPEG"
    bad.write_bytes(damage(bad.read_bytes()))
    pets = load(root)
    with pytest.raises(InputError, match=rf"corrupt image {bad} .*skip_corrupt"):
        list(pets.batches(5))
    with pytest.raises(InputError, match="corrupt image"):
        pets.test()
    names = []
    batches = list(pets.batches(5, on_corrupt=names.append))
    assert names == [str(bad)]
    assert [len(batch.labels) for batch in batches] == [5, 5, 1]


def test_an_image_that_cannot_be_read_is_named_as_a_corrupt_one_is(root):
    bad = root / "val" / "bee" / "3.JPEG"
    pets = load(root)
    bad.unlink()
    with pytest.raises(InputError, match=rf"corrupt image {bad} .*No such file"):
        list(pets.batches(5))
    names = []
    assert sum(len(batch.labels) for batch in pets.batches(5, on_corrupt=names.append)) == 11
    assert names == [str(bad)]


def test_corrupt_calibration_images(root):
    files = sorted((root / "train" / "cat").iterdir())
    for file in files:
        file.write_bytes(b"abc")
    with pytest.raises(InputError, match=r"corrupt image .*/train/cat/"):
        load(root).calibration(30)
    names = []
    kept = load(root).calibration(30, 0, names.append)
    assert len(kept.labels) == 20
    assert sorted(names) == [str(file) for file in files if file.suffix != ".txt"]
    assert set(kept.labels) == {0, 1}


def test_nothing_readable_at_all(root):
    for file in (root / "train").rglob("*.*"):
        file.write_bytes(b"abc")
    with pytest.raises(InputError, match="not one of the 5 train images"):
        load(root).calibration(5, 0, lambda name: None)


def test_a_folder_with_one_split(root):
    (root / "train").rename(root / "elsewhere")
    pets = load(root)
    assert pets.test_size == 12
    with pytest.raises(InputError, match=r"no training split.*calibration_dataset"):
        pets.calibration(8)


def test_a_folder_without_splits(tmp_path):
    with pytest.raises(InputError, match="neither train/ nor val/"):
        data.load("folder:none", tmp_path)


@pytest.mark.parametrize(("split", "other"), [("val", "train"), ("train", "val")])
def test_missing_class_folders(root, split, other):
    (root / split / "bee").rename(root / "elsewhere")
    with pytest.raises(InputError, match=rf"{split} lacks 1 of the 3 class folders of {other}/: b"):
        load(root)


def test_empty_folders(root):
    (root / "val" / "dog").mkdir()
    (root / "train" / "dog").mkdir()
    with pytest.raises(InputError, match=r"class folder .*dog holds no images"):
        load(root)


def test_no_class_folders(tmp_path):
    (tmp_path / "x" / "train").mkdir(parents=True)
    with pytest.raises(InputError, match="train holds no class folders"):
        data.load("folder:x", tmp_path)


def test_images_of_different_sizes_cannot_be_kept_as_they_are(root):
    (root / "val" / "bee" / "3.JPEG").write_bytes(picture(0, size=(40, 25)))
    with pytest.raises(InputError, match=r"differ in size.*\(25, 33, 3\).*\(25, 40, 3\).*'keep'"):
        load(root, data.Preprocessing(geometry="keep")).test()


def test_reading_that_stops_early_leaves_no_threads(root):
    before = set(threading.enumerate())
    batches = load(root).batches(2)
    next(batches)
    batches.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


def test_no_more_is_read_than_the_next_batch(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    read, stored = [], picture()

    def record(index):
        read.append(index)
        return Record(str(index), stored, 0)

    endless = dataset("endless", 1, NONE, Records(10**6, record), SMALL)
    batches = endless.batches(4)
    next(batches)
    time.sleep(0.3)
    assert len(read) <= 4 + 4 + 2
    batches.close()


def test_missing_package_says_what_to_install(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(InputError, match="pip install"):
        load(root).test()
