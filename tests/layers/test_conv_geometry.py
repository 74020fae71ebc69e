import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquant_jax.layers.conv_geometry import Window
from tests.support import numpy_reference as reference
from tests.support.nets import normal, rng_of

WINDOWS = [
    Window(2, (5, 6), (3, 3), (1, 1), (1, 1)),
    Window(1, (7, 5), (2, 3), (2, 1), (1, 1)),
    Window(3, (9, 11), (2, 2), (2, 3), (1, 1)),
    Window(2, (9, 8), (3, 2), (1, 2), (2, 3)),
    Window(2, (4, 4), (1, 1), (3, 3), (1, 1)),
    Window(1, (3, 3), (3, 3), (1, 1), (1, 1)),
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_taps_are_the_columns_of_im2col(window):
    x = normal(rng_of(0), window.images, *window.spatial, 3)
    found = [window.crop(tap) for tap in window.taps(window.flatten(jnp.asarray(x)))]
    expected = reference.im2col(x, window.kernel, strides=window.strides, dilation=window.dilation)
    assert window.out == expected.shape[1:3]
    np.testing.assert_array_equal(np.stack(found, 3), expected)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_phases_hold_every_pixel_once(window):
    size = window.images * int(np.prod(window.spatial))
    x = jnp.arange(1.0, size + 1.0).reshape(window.images, *window.spatial, 1)
    phases = window.flatten(x)
    assert len(phases) == int(np.prod(window.strides))
    assert {phase.shape for phase in phases} == {(window.images * int(np.prod(window.grid)), 1)}
    every = np.concatenate([np.asarray(phase).ravel() for phase in phases])
    assert sorted(every[every > 0]) == list(range(1, size + 1))


def test_masks_are_flattened_too():
    window = WINDOWS[2]
    mask = rng_of(1).random((3, 9, 11, 2)) < 0.5
    taps = window.taps(window.flatten(jnp.asarray(mask)))
    assert {tap.dtype for tap in taps} == {jnp.dtype(bool)}


def test_what_leaves_the_image_gets_no_gradient():
    window = WINDOWS[0]
    rows = window.taps(window.flatten(jnp.ones((2, 5, 6, 1))))[0].shape[0]
    gradient = jax.grad(lambda y: window.crop(y).sum())(jnp.ones((rows, 1)))
    assert gradient.sum() == 2 * 3 * 4
