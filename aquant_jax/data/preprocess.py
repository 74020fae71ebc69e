"""Preprocessing of images: resize, crop, normalise.

Resizing is PIL's, which is what torchvision applies to PIL images; sizes and offsets are rounded
as torchvision rounds them.

References:
    torchvision.transforms: Resize, CenterCrop, RandomResizedCrop, RandomHorizontalFlip.
    M. Tan, Q. Le, EfficientNet (2019), preprocessing.py of the TensorFlow code: crop, then resize.
"""

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from aquant_jax.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

GEOMETRIES = ("resize_crop", "crop_resize", "squash", "resize", "keep")
WITHOUT_CROPS = ("resize", "keep")  # those of networks that were trained so
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The preprocessing that a checkpoint was trained and scored with.

    Attributes:
        size: side of the square image that the network takes, in pixels.
        resize: length of the short side before the centre crop; with ``crop_resize`` the crop is
            ``size / resize`` of the short side.
        interpolation: of PIL: nearest, bilinear, bicubic or lanczos.
        geometry: ``resize_crop``: resize the short side, then crop (torchvision);
            ``crop_resize``: crop, then resize (EfficientNet of TensorFlow);
            ``squash``: resize both sides to ``size``, whatever their ratio;
            ``resize``: the same, for calibration too, which takes random crops otherwise;
            ``keep``: leave all images unchanged, those for calibration included.
        mean: per channel, subtracted from pixels in [0, 1]. Three numbers read images in RGB, one
            reads them in grey.
        std: per channel, divides the difference.
    """

    size: int = 224
    resize: int = 256
    interpolation: str = "bilinear"
    geometry: str = "resize_crop"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for field, value, known in (
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("geometry", self.geometry, GEOMETRIES),
        ):
            if value not in known:
                raise InputError(f"unknown {field} {value!r}; there are {', '.join(known)}")
        if not 0 < self.size <= self.resize:
            raise InputError(f"size {self.size} is not between 1 and resize {self.resize}")
        if self.channels not in (1, 3) or len(self.std) != self.channels or min(self.std) <= 0:
            raise InputError(
                f"mean {self.mean} and std {self.std} must be three numbers each, or one for grey "
                "images, std above 0"
            )

    @property
    def channels(self) -> int:
        """Those of the network's input: 3 for RGB, 1 for grey."""
        return len(self.mean)


IMAGENET = Preprocessing()
CIFAR = Preprocessing(geometry="keep")
DIGITS = Preprocessing(size=8, resize=8, geometry="resize", mean=(0.0,), std=(1.0,))
EFFICIENTNET_LITE = Preprocessing(
    interpolation="bicubic",
    geometry="crop_resize",
    mean=(127 / 255,) * 3,  # (x - 127) / 128 for x in 0..255
    std=(128 / 255,) * 3,
)


def for_evaluation(image: "Image", preprocessing: Preprocessing) -> np.ndarray:
    """Prepares an image for evaluation.

    Args:
        image: in mode RGB, or L for a network of one channel.
        preprocessing: that of the checkpoint.

    Returns:
        [size, size, channels] float32.
    """
    short = min(image.size)
    if preprocessing.geometry == "resize_crop":
        # torchvision truncates the long side: int(resize * long / short).
        resized = _resize(
            image, tuple(int(preprocessing.resize * n / short) for n in image.size), preprocessing
        )
        image = resized.crop(_centre_box(resized.size, preprocessing.size))
    elif preprocessing.geometry == "crop_resize":
        side = int(preprocessing.size / preprocessing.resize * short)
        left, top = ((n - side + 1) // 2 for n in image.size)
        image = _resize(
            image.crop((left, top, left + side, top + side)),
            (preprocessing.size,) * 2,
            preprocessing,
        )
    elif preprocessing.geometry in ("squash", "resize"):
        image = _resize(image, (preprocessing.size,) * 2, preprocessing)
    return normalise(np.atleast_3d(np.asarray(image)), preprocessing)


def for_calibration(
    image: "Image", preprocessing: Preprocessing, rng: np.random.Generator
) -> np.ndarray:
    """Takes a random crop of an image, flipped half of the time, as in training.

    Args:
        image: in mode RGB, or L for a network of one channel.
        preprocessing: that of the checkpoint; ``resize`` and ``keep`` are for those trained without
            crops.
        rng: draws the crop and the flip.

    Returns:
        [size, size, channels] float32.
    """
    from PIL.Image import Transpose

    if preprocessing.geometry in WITHOUT_CROPS:
        return for_evaluation(image, preprocessing)
    image = _resize(
        image.crop(random_box(*image.size, rng)), (preprocessing.size,) * 2, preprocessing
    )
    if rng.random() < 0.5:
        image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
    return normalise(np.atleast_3d(np.asarray(image)), preprocessing)


def normalise(pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Maps pixels [..., W, channels] in 0..255 to float32: ``(x / 255 - mean) / std``."""
    width = pixels.shape[-2]
    # Row by row: an inner loop over three channels takes numpy eight times as long.
    rows = pixels.reshape(*pixels.shape[:-2], width * preprocessing.channels).astype(np.float32)
    rows /= np.float32(255)
    rows -= np.tile(np.array(preprocessing.mean, np.float32), width)
    rows /= np.tile(np.array(preprocessing.std, np.float32), width)
    return rows.reshape(pixels.shape)


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """A random crop, distributed as torchvision's RandomResizedCrop.

    Args:
        width: of the image.
        height: of the image.
        rng: draws the share of the area (0.08 to 1), the ratio (3/4 to 4/3) and the position.

    Returns:
        A box within the image; after ten draws that do not fit, the largest centred box with an
        allowed ratio.
    """
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = (int(rng.integers(room + 1)) for room in (height - h, width - w))
            return left, top, left + w, top + h
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _centre_box(size: tuple[int, int], side: int) -> Box:
    # round() rounds halves to even, as torchvision's CenterCrop does.
    left, top = (round((n - side) / 2) for n in size)
    return left, top, left + side, top + side


def _resize(image: "Image", size: tuple[int, ...], preprocessing: Preprocessing) -> "Image":
    from PIL.Image import Resampling

    width, height = size
    return image.resize((width, height), Resampling[preprocessing.interpolation.upper()])
