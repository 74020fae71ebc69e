"""Augmentations of images for the whole-network stage, which need no labels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from aquant_jax.errors import InputError

SHIFT = 8  # the largest shift is the image's side divided by this, rounded up


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


def flip_and_shift(key: jax.Array, images: jax.Array) -> jax.Array:
    """Half of the images ``[N, H, W, C]`` mirrored from left to right, and all shifted."""
    flipping, shifting = jax.random.split(key)
    flipped = jax.random.bernoulli(flipping, shape=(len(images), 1, 1, 1))
    return shift(shifting, jnp.where(flipped, images[:, :, ::-1], images))


AUGMENTATIONS = {"shift": shift, "flip_and_shift": flip_and_shift}


def get(name: str | None) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """The augmentation of a config; None for none.

    Raises:
        InputError: an unknown name.
    """
    if not name:
        return None
    if name not in AUGMENTATIONS:
        raise InputError(f"unknown augment {name!r}; known: {', '.join(AUGMENTATIONS)}")
    return AUGMENTATIONS[name]
