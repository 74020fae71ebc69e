"""Data sets of tfds, written here as tfds would, and the real ones where they are."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from aquant_jax import data
from aquant_jax.errors import InputError
from tests.data.test_folder import SMALL, picture

MODULE = "tensorflow_datasets.core.features."


def write_set(folder, name, splits, classes=5, label="label", path="1.0.0"):
    """Prepares a set as array_record: ``splits`` maps a split to (image, label) pairs."""
    from array_record.python.array_record_module import ArrayRecordWriter

    root = folder / "tensorflow_datasets" / name / path
    root.mkdir(parents=True)
    for split, records in splits.items():
        file = root / f"{name}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for index, (image, target) in enumerate(records):
            writer.write(example(image, label, target, f"{split}{index}.JPEG"))
        writer.close()
    (root / "dataset_info.json").write_text(json.dumps(info(name, splits, root.name)))
    (root / "features.json").write_text(json.dumps(features(label, classes)))


def example(image, label, target, name):
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    feature = {
        "image": {"bytes_list": {"value": [image]}},
        "file_name": {"bytes_list": {"value": [name.encode()]}},
        label: {"int64_list": {"value": [target]}},
    }
    made = {key: tf_feature_pb2.Feature(**value) for key, value in feature.items()}
    whole = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=made))
    return whole.SerializeToString()


def info(name, splits, version):
    return {
        "fileFormat": "array_record",
        "name": name,
        "moduleName": name,
        "version": version,
        "splits": [
            {
                "name": split,
                "numBytes": "1",
                "shardLengths": [str(len(records))],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
            for split, records in splits.items()
        ],
    }


def features(label, classes):
    shape = {"dimensions": ["-1", "-1", "3"]}
    image = {"dtype": "uint8", "encodingFormat": "jpeg", "shape": shape}
    kinds = {
        "file_name": ("text_feature.Text", {"text": {}}),
        "image": ("image_feature.Image", {"image": image}),
        label: ("class_label_feature.ClassLabel", {"classLabel": {"numClasses": str(classes)}}),
    }
    stored = {key: {"pythonClassName": MODULE + kind, **of} for key, (kind, of) in kinds.items()}
    return {
        "pythonClassName": f"{MODULE}features_dict.FeaturesDict",
        "featuresDict": {"features": stored},
    }


def pairs(number, first=0):
    return [(picture(first + index), index % 5) for index in range(number)]


def test_any_classification_set_of_tfds(tmp_path):
    write_set(tmp_path, "birds", {"train": pairs(9), "validation": pairs(7, 50)})
    birds = data.load("birds", tmp_path, SMALL)
    assert (birds.num_classes, birds.train_size, birds.test_size) == (5, 9, 7)
    assert birds.test().labels.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert birds.test().inputs.shape == (7, 16, 16, 3)
    assert sorted(birds.calibration(9).labels.tolist()) == sorted(x % 5 for x in range(9))
    assert "tensorflow" not in sys.modules


def test_validation_is_scored_on_unless_another_split_is_named(tmp_path):
    write_set(tmp_path, "birds", {"test": pairs(3), "validation": pairs(7)})
    assert data.load("birds", tmp_path, SMALL).test_size == 7
    assert data.load("birds", tmp_path, SMALL, test_split="test").test_size == 3
    with pytest.raises(InputError, match=r"no split 'val'; there are .*validation"):
        data.load("birds", tmp_path, test_split="val")


def test_a_set_may_lack_either_split(tmp_path):
    write_set(tmp_path, "heldout", {"test": pairs(3)})
    write_set(tmp_path, "sample", {"train": pairs(4)})
    assert data.load("heldout", tmp_path, SMALL).test_size == 3
    with pytest.raises(InputError, match="heldout has no training split for 2 calibration"):
        data.load("heldout", tmp_path).check_calibration(2)
    sample = data.load("sample", tmp_path, SMALL)
    with pytest.raises(InputError, match=r"5 calibration samples asked of sample.* has 4"):
        sample.check_calibration(5)
    with pytest.raises(InputError, match="sample has no test split"):
        sample.batches(2)


@pytest.mark.parametrize(
    ("name", "path", "splits"),
    [
        ("imagenet2012", "5.1.0", ("train", "validation")),
        ("imagenet_v2/matched-frequency", "matched-frequency/3.0.0", ("test",)),
    ],
)
def test_the_public_imagenet_sets(tmp_path, name, path, splits):
    records = {split: pairs(3) for split in splits}
    write_set(tmp_path, name.partition("/")[0], records, 1000, path=path)
    opened = data.load(name, tmp_path, SMALL)
    assert (opened.test_size, opened.num_classes) == (3, 1000)
    assert opened.train_size == (3 if "train" in splits else 0)
    assert opened.test().labels.tolist() == [0, 1, 2]


def test_a_corrupt_record_is_named(tmp_path):
    write_set(tmp_path, "birds", {"validation": [*pairs(2), (picture(0)[:300], 1)]})
    birds = data.load("birds", tmp_path, SMALL)
    with pytest.raises(InputError, match=r"corrupt image validation2.JPEG in birds"):
        birds.test()
    names = []
    (batch,) = birds.batches(5, on_corrupt=names.append)
    assert (len(batch.labels), names) == (2, ["validation2.JPEG"])


def test_records_that_are_no_labelled_images(tmp_path):
    write_set(tmp_path, "odd", {"train": pairs(2)}, label="objects")
    with pytest.raises(InputError, match=r"odd is not an image classification set.*objects"):
        data.load("odd", tmp_path)


def test_imagenet_that_is_not_prepared_says_how_to_prepare_it(tmp_path):
    with pytest.raises(InputError) as caught:
        data.load("imagenet2012", tmp_path)
    steps = (
        "imagenet2012' is not prepared",
        "ILSVRC2012_img_train.tar",
        "ILSVRC2012_img_val.tar",
        "manual_dir",
        "file_format='array_record').download_and_prepare()",
    )
    places = [str(caught.value).index(step) for step in steps]
    assert places == sorted(places)


def test_a_set_prepared_in_another_format_is_not_prepared(tmp_path):
    (tmp_path / "tensorflow_datasets" / "cifar10" / "3.0.2").mkdir(parents=True)
    with pytest.raises(InputError, match=r"cifar10' is not prepared.*download_and_prepare"):
        data.load("cifar10", tmp_path)


def test_what_tfds_says_of_a_damaged_set_is_told(tmp_path):
    write_set(tmp_path, "objects", {"train": pairs(2)})
    (info,) = tmp_path.rglob("dataset_info.json")
    info.write_text('{"name": 3')
    with pytest.raises(InputError, match=r"not prepared.*\(tfds says: Failed to load JSON"):
        data.load("objects", tmp_path)


def test_a_set_outside_of_the_catalogue_is_to_be_copied(tmp_path):
    with pytest.raises(InputError, match=r"cifar10_jpeg' is not prepared.*copy"):
        data.load("cifar10_jpeg", tmp_path)
    with pytest.raises(InputError, match=r"'mnits'.*digits.*folder:PATH.*cifar10.*imagenet2012"):
        data.load("mnits", tmp_path)


def test_cifar_images_are_kept_as_they_are(shared_data):
    cifar10 = data.load("cifar10_jpeg", shared_data)
    assert (cifar10.train_size, cifar10.test_size) == (50_000, 10_000)
    calibration = cifar10.calibration(32, seed=5)
    assert calibration.inputs.shape == (32, 32, 32, 3)
    assert np.abs(calibration.inputs).max() < 3
    assert set(calibration.labels) <= set(range(10))


def test_the_shared_imagenet_subsets(shared_data):
    held_out = data.load("imagenet_val_1300", shared_data, data.EFFICIENTNET_LITE)
    assert (held_out.test_size, held_out.train_size, held_out.num_classes) == (1300, 0, 1000)
    images, labels = held_out.test(8)
    assert images.shape == (8, 224, 224, 3)
    assert np.abs(images).max() <= 1
    assert len(set(labels.tolist())) > 1
    sample = data.load("imagenet_sample_1000", shared_data, data.EFFICIENTNET_LITE)
    assert (sample.train_size, sample.test_size) == (1000, 0)
    assert len(set(sample.calibration(50).labels.tolist())) == 50


@pytest.mark.parametrize("damage", ["middle", "cut", "empty"])
def test_a_damaged_file_is_an_input_error(tmp_path, damage):
    noise = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(noise, "PNG")
    write_set(tmp_path, "shapes", {"train": [(noise.getvalue(), 0)] * 20})
    (file,) = tmp_path.glob("tensorflow_datasets/shapes/*/*.array_record*")
    whole = file.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "middle": whole[:middle] + bytes(2000) + whole[middle + 2000 :],
        "cut": whole[:middle],
        "empty": b"",
    }
    file.write_bytes(damaged[damage])
    shapes = data.load("shapes", tmp_path, SMALL)
    with pytest.raises(InputError, match=r"corrupt image number \d+ of train in shapes \(.*ec"):
        shapes.calibration(20, 0)
