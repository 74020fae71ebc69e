"""Augmentations of images for the whole-network stage, which need no labels."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from aquant_jax.errors import InputError

SHIFT = 8  # the largest shift is the image's side divided by this, rounded up
LEAST_AREA = 0.25  # of a crop, as a share of its image
MOST_RATIO = 4 / 3  # of the sides of a crop, and its inverse the least


def shift(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each image ``[N, H, W, C]`` moved by up to an eighth of its sides, reflected at its edges."""
    sides = images.shape[1:3]
    margins = [-(-side // SHIFT) for side in sides]
    padded = jnp.pad(images, [(0, 0), *((m, m) for m in margins), (0, 0)], mode="reflect")
    counts = 2 * jnp.array([margins]) + 1
    starts = jax.random.randint(key, (len(images), 2), 0, counts)

    def crop(image: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (start[0], start[1], 0), (*sides, image.shape[2]))

    return jax.vmap(crop)(padded, starts)


def crop(key: jax.Array, images: jax.Array) -> jax.Array:
    """A part of each image ``[N, H, W, C]``, enlarged to its size: at least a quarter of its area,
    of random position and proportions (Szegedy et al. 2015, section 6)."""
    of_area, of_ratio, of_corner = jax.random.split(key, 3)
    sides = jnp.asarray(images.shape[1:3], jnp.float32)
    area = jax.random.uniform(of_area, (len(images), 1), minval=LEAST_AREA)
    bound = math.log(MOST_RATIO)
    ratio = jnp.exp(jax.random.uniform(of_ratio, (len(images), 1), minval=-bound, maxval=bound))
    shares = jnp.minimum(jnp.sqrt(area * jnp.concatenate([ratio, 1 / ratio], 1)), 1.0)
    corners = jax.random.uniform(of_corner, shares.shape) * (1 - shares) * sides[None]

    def enlarge(image: jax.Array, share: jax.Array, corner: jax.Array) -> jax.Array:
        scale, offset = 1 / share, -corner / share
        return jax.image.scale_and_translate(image, image.shape, (0, 1), scale, offset, "linear")

    return jax.vmap(enlarge)(images, shares, corners)


def _flipped(
    key: jax.Array, images: jax.Array, then: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Half of the images mirrored from left to right, and `then` applied to all."""
    flipping, moving = jax.random.split(key)
    flipped = jax.random.bernoulli(flipping, shape=(len(images), 1, 1, 1))
    return then(moving, jnp.where(flipped, images[:, :, ::-1], images))


def flip_and_shift(key: jax.Array, images: jax.Array) -> jax.Array:
    """Half of the images ``[N, H, W, C]`` mirrored from left to right, and all shifted."""
    return _flipped(key, images, shift)


def flip_and_crop(key: jax.Array, images: jax.Array) -> jax.Array:
    """Half of the images ``[N, H, W, C]`` mirrored from left to right, and all cropped."""
    return _flipped(key, images, crop)


AUGMENTATIONS = {
    "shift": shift,
    "flip_and_shift": flip_and_shift,
    "crop": crop,
    "flip_and_crop": flip_and_crop,
}


def get(name: str | None) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """The augmentation of a config; None for none.

    Raises:
        InputError: an unknown name.
    """
    if not name:
        return None
    if not isinstance(name, str) or name not in AUGMENTATIONS:
        raise InputError(f"unknown augment {name!r}; known: {', '.join(AUGMENTATIONS)}")
    return AUGMENTATIONS[name]
