"""What a network sees, against plain PIL with every size and offset worked out by hand.

The pictures and what PIL made of them are in golden/preprocess; to write them anew:
``python tests/test_data_preprocess.py``.
"""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.Image import Resampling

from aquant_jax import data
from aquant_jax.data.preprocess import for_calibration, for_evaluation, random_box
from aquant_jax.data.records import Corrupt, Record, decode
from aquant_jax.errors import InputError
from tests.support.process import REPOSITORY

FOLDER = REPOSITORY / "tests" / "golden" / "preprocess"
PICTURES = {  # file: (width, height), mode as stored
    "wide.jpg": ((331, 219), "RGB"),
    "even_half.jpg": ((163, 109), "RGB"),
    "tall_grey.jpg": ((201, 290), "L"),
    "cmyk.jpg": ((253, 181), "CMYK"),
    "rgba.png": ((61, 47), "RGBA"),
    "small.jpg": ((97, 64), "RGB"),
}
LITE = data.EFFICIENTNET_LITE
SMALL = data.Preprocessing(size=56, resize=64)
SQUASH = data.Preprocessing(size=57, resize=64, geometry="squash", interpolation="bicubic")


def crop_after(resized, left, top, side, interpolation=Resampling.BILINEAR):
    """torchvision: Resize, then CenterCrop."""
    return lambda image: np.asarray(image.resize(resized, interpolation))[
        top : top + side, left : left + side
    ]


def resize_after(left, top, crop, side, interpolation=Resampling.BICUBIC):
    """EfficientNet of TensorFlow: crop, then resize."""

    def make(image):
        pixels = np.asarray(image)[top : top + crop, left : left + crop]
        return np.asarray(Image.fromarray(pixels).resize((side, side), interpolation))

    return make


CASES = {  # case: (picture, our preprocessing, the reference by hand)
    # 256 * 331 / 219 = 386.9 -> 386; (386 - 224) / 2 = 81; (256 - 224) / 2 = 16
    "imagenet": ("wide.jpg", data.IMAGENET, crop_after((386, 256), 81, 16, 224)),
    # 64 * 163 / 109 = 95.7 -> 95; (95 - 56) / 2 = 19.5 -> 20, the even one
    "half_up": ("even_half.jpg", SMALL, crop_after((95, 64), 20, 4, 56)),
    # (95 - 54) / 2 = 20.5 -> 20, the even one; (64 - 54) / 2 = 5
    "half_down": (
        *("even_half.jpg", data.Preprocessing(size=54, resize=64)),
        crop_after((95, 64), 20, 5, 54),
    ),
    # 64 * 290 / 201 = 92.3 -> 92; (92 - 56) / 2 = 18
    "grey_bicubic": (
        *("tall_grey.jpg", data.Preprocessing(size=56, resize=64, interpolation="bicubic")),
        crop_after((64, 92), 4, 18, 56, Resampling.BICUBIC),
    ),
    # 64 * 253 / 181 = 89.4 -> 89; (89 - 56) / 2 = 16.5 -> 16
    "cmyk": ("cmyk.jpg", SMALL, crop_after((89, 64), 16, 4, 56)),
    # enlarged: 64 * 61 / 47 = 83.06 -> 83; (83 - 56) / 2 = 13.5 -> 14
    "rgba": ("rgba.png", SMALL, crop_after((83, 64), 14, 4, 56)),
    # the short side has the right length already: 97 x 64; (97 - 56) / 2 = 20.5 -> 20
    "same_size": ("small.jpg", SMALL, lambda image: np.asarray(image)[4:60, 20:76]),
    # 219 * 7 / 8 = 191.6 -> 191; (331 - 191 + 1) // 2 = 70; (219 - 191 + 1) // 2 = 14
    "lite": ("wide.jpg", LITE, resize_after(70, 14, 191, 224)),
    # 47 * 7 / 8 = 41.1 -> 41; (61 - 41 + 1) // 2 = 10; (47 - 41 + 1) // 2 = 3
    "lite_enlarged": ("rgba.png", LITE, resize_after(10, 3, 41, 224)),
    # 64 * 7 / 8 = 56; (97 - 56 + 1) // 2 = 21; (64 - 56 + 1) // 2 = 4
    "lite_odd": ("small.jpg", LITE, resize_after(21, 4, 56, 224)),
    "squash": ("small.jpg", SQUASH, lambda image: np.asarray(image.resize((57, 57), 3))),
    "keep": ("small.jpg", data.Preprocessing(geometry="keep"), np.asarray),
}
GOLDEN = ("imagenet", "half_up", "grey_bicubic", "cmyk", "rgba", "lite", "squash")


def opened(name):
    with Image.open(FOLDER / name) as image:
        return image.convert("RGB")


def ours(picture, how):
    image, label = decode(Record(picture, (FOLDER / picture).read_bytes(), 3), how)
    assert (image.dtype, label) == (np.float32, 3)
    return image


def in_pixels(image, how):
    return image * np.float32(how.std) + np.float32(how.mean)


def assert_same_pixels(image, how, expected):
    """Within 1/255 for 99.9% of the pixels."""
    assert image.shape == expected.shape
    error = np.abs(in_pixels(image, how) - expected.astype(np.float32) / np.float32(255))
    assert np.mean(error <= 1 / 255 + 1e-6) >= 0.999


@pytest.mark.parametrize("case", CASES)
def test_evaluation_is_pil_with_the_sizes_of_torchvision(case):
    picture, how, reference = CASES[case]
    expected = reference(opened(picture)).astype(np.float32)
    np.testing.assert_allclose(in_pixels(ours(picture, how), how) * 255, expected, atol=1e-3)


@pytest.mark.parametrize("case", GOLDEN)
def test_evaluation_equals_the_golden_file(case):
    with Image.open(FOLDER / f"expected_{case}.png") as image:
        expected = np.asarray(image.convert("RGB"))
    picture, how, _ = CASES[case]
    assert_same_pixels(ours(picture, how), how, expected)


def test_golden_pictures_are_what_they_claim_and_small():
    for name, (size, mode) in PICTURES.items():
        with Image.open(FOLDER / name) as image:
            assert (image.size, image.mode) == (size, mode)
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 200_000


def test_lite_input_is_x_minus_127_over_128():
    grey = for_evaluation(Image.new("RGB", (300, 300), (0, 127, 255)), LITE)
    np.testing.assert_allclose(grey[0, 0], [-127 / 128, 0, 1], atol=1e-6)


def test_normalisation_is_per_channel():
    how = data.IMAGENET
    white = for_evaluation(Image.new("RGB", (230, 260), (255, 255, 255)), how)
    np.testing.assert_allclose(white[5, 7], (1 - np.array(how.mean)) / how.std, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"interpolation": "cubic"}, "'cubic'.*bicubic"),
        ({"geometry": "crop"}, "'crop'.*resize_crop"),
        ({"size": 0}, "size 0"),
        ({"size": 288}, "288.*256"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
        ({"mean": (0.5,)}, "three"),
        ({"mean": (0.5,) * 2, "std": (0.5,) * 2}, "three numbers each, or one for grey images"),
    ],
)
def test_wrong_preprocessing(fields, words):
    with pytest.raises(InputError, match=words):
        data.Preprocessing(**fields)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (60, 60)])
def test_random_boxes_have_the_area_and_the_ratio_of_training(size):
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(*size, rng) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= size[0]
    assert bottom.max() <= size[1]
    share = (right - left) * (bottom - top) / (size[0] * size[1])
    ratio = (right - left) / (bottom - top)
    assert 0.075 < share.min() < 0.12
    assert 0.9 < share.max() <= 1
    assert 0.7 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.4
    # Each place that a box can be at is as likely as any other.
    assert np.mean(left / np.maximum(size[0] - right + left, 1)) == pytest.approx(0.5, abs=0.05)


def test_a_box_that_never_fits_is_the_largest_centred_one():
    assert random_box(10000, 90, np.random.default_rng(0)) == (4940, 0, 5060, 90)
    assert random_box(90, 10001, np.random.default_rng(0)) == (0, 4940, 90, 5060)


def test_calibration_images_are_flipped_half_of_the_time():
    ramp = np.repeat(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], 64, axis=0)
    image = Image.fromarray(np.repeat(ramp, 3, axis=2))
    seen = [for_calibration(image, SMALL, np.random.default_rng(seed)) for seed in range(200)]
    assert {x.shape for x in seen} == {(56, 56, 3)}
    flipped = np.mean([x[:, 0].mean() > x[:, -1].mean() for x in seen])
    assert flipped == pytest.approx(0.5, abs=0.1)


def test_a_damaged_picture_is_corrupt():
    whole = (FOLDER / "wide.jpg").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no picture", b""):
        found = decode(Record("n01.JPEG", damaged, 0), data.IMAGENET)
        assert isinstance(found, Corrupt)
        assert found.name == "n01.JPEG"
        assert found.reason


def write_golden():
    rng = np.random.default_rng(0)
    for name, (size, mode) in PICTURES.items():
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        image = coarse.resize(size, Resampling.BICUBIC)
        image = ImageOps.posterize(image, 3) if name == "rgba.png" else image
        stored = io.BytesIO()
        quality = {} if name.endswith("png") else {"quality": 80}
        image.convert(mode).save(stored, "PNG" if not quality else "JPEG", **quality)
        (FOLDER / name).write_bytes(stored.getvalue())
    for case in GOLDEN:
        picture, _, reference = CASES[case]
        Image.fromarray(reference(opened(picture))).save(FOLDER / f"expected_{case}.png")


if __name__ == "__main__":
    write_golden()
