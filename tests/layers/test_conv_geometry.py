import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquant_jax.layers.conv_geometry import ConvGeometry
from tests.support import numpy_reference as reference
from tests.support.nets import normal, rng_of


def geometry(spatial, kernel, strides, dilation):
    return ConvGeometry(spatial, kernel, strides, dilation, ((0, 0),) * len(kernel))


CASES = [  # images, geometry
    (2, geometry((5, 6), (3, 3), (1, 1), (1, 1))),
    (1, geometry((7, 5), (2, 3), (2, 1), (1, 1))),
    (3, geometry((9, 11), (2, 2), (2, 3), (1, 1))),
    (2, geometry((9, 8), (3, 2), (1, 2), (2, 3))),
    (2, geometry((4, 4), (1, 1), (3, 3), (1, 1))),
    (1, geometry((3, 3), (3, 3), (1, 1), (1, 1))),
]


@pytest.mark.parametrize(("images", "geometry"), CASES, ids=str)
def test_taps_are_the_columns_of_im2col(images, geometry):
    x = normal(rng_of(0), images, *geometry.spatial, 3)
    rows = geometry.tap_rows(geometry.flatten(jnp.asarray(x)))
    columns = np.stack([geometry.crop(tap, images) for tap in rows], 3)
    expected = reference.im2col(
        x, geometry.kernel, strides=geometry.strides, dilation=geometry.dilation
    )
    assert geometry.out == expected.shape[1:3]
    np.testing.assert_array_equal(columns, expected)


@pytest.mark.parametrize(("images", "geometry"), CASES, ids=str)
def test_phases_hold_every_pixel_once(images, geometry):
    size = images * int(np.prod(geometry.spatial))
    x = jnp.arange(1.0, size + 1.0).reshape(images, *geometry.spatial, 1)
    phases = geometry.flatten(x)
    assert len(phases) == int(np.prod(geometry.strides))
    assert {phase.shape for phase in phases} == {(images * int(np.prod(geometry.phase)), 1)}
    every = np.concatenate([np.asarray(phase).ravel() for phase in phases])
    assert sorted(every[every > 0]) == list(range(1, size + 1))


def test_masks_are_flattened_too():
    _, geometry = CASES[2]
    mask = rng_of(1).random((3, 9, 11, 2)) < 0.5
    taps = geometry.tap_rows(geometry.flatten(jnp.asarray(mask)))
    assert {tap.dtype for tap in taps} == {jnp.dtype(bool)}


def test_pixels_outside_the_image_get_no_gradient():
    _, geometry = CASES[0]
    rows = geometry.tap_rows(geometry.flatten(jnp.ones((2, 5, 6, 1))))[0].shape[0]
    gradient = jax.grad(lambda y: geometry.crop(y, 2).sum())(jnp.ones((rows, 1)))
    assert gradient.sum() == 2 * 3 * 4


def test_padding_is_part_of_the_geometry():
    padded = ConvGeometry((5, 4), (3, 2), (2, 1), (1, 2), ((1, 0), (2, 3)), groups=2)
    assert padded.padded == (6, 9)
    assert padded.span == (3, 3)
    assert padded.out == (2, 7)
    assert padded.taps == 6
    plain = padded.without_padding()
    assert (plain.spatial, plain.padded, plain.out) == ((6, 9), (6, 9), (2, 7))
    assert plain.groups == 2


def test_a_dense_layer_is_a_pointwise_convolution():
    assert ConvGeometry.pointwise(7).out == (7, 1)
