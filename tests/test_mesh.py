"""``quantize(..., mesh=...)``: the samples are split over devices, and the result is the same."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import aquant_jax as aq
from tests.support.nets import images, small_net
from tests.support.process import run_python

MESHES = ["1x1", "4x1", "2x2"]


@pytest.fixture(scope="module")
def found():
    """What one process with four devices saw: starting and compiling one takes long."""
    program = "from tests.support import four_devices; four_devices.main()"
    process = run_python(program, JAX_NUM_CPU_DEVICES="4")
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_are_those_of_one_device(found, mesh):
    """Of the first block within float sums. A sum may round one code of its output otherwise, from
    where on the second block and the whole-network stage see another input."""
    losses, expected = np.array(found[mesh]["losses"]), np.array(found["one"]["losses"])
    assert losses.shape == expected.shape == (20 + 20 + 4,)
    np.testing.assert_allclose(losses[:20], expected[:20], rtol=1e-5)
    for part in (slice(20, 40), slice(40, 44)):
        np.testing.assert_allclose(losses[part].mean(), expected[part].mean(), rtol=0.05)
    scale = np.ptp(found["one"]["outputs"])
    np.testing.assert_allclose(found[mesh]["outputs"], found["one"]["outputs"], atol=0.01 * scale)


def test_losses_of_two_devices_are_those_of_one(found):
    np.testing.assert_allclose(found["2x1"]["few_losses"], found["one"]["few_losses"], rtol=1e-4)


def test_the_axis_model_has_memory_for_a_block_that_one_device_has_not(found):
    """2x2 ran in as much memory, and its losses are those of one device."""
    assert "block 0 conv needs about 2.07 MiB of memory on device, and 1.43" in found["refused"]


def test_the_same_batches_are_drawn(found):
    assert len({found[mesh]["batches"] for mesh in MESHES}) == 1
    assert found["2x1"]["few"] == found["one"]["few"]  # none held out


def test_one_device_of_a_mesh_gives_the_same_bits(found):
    assert found["1x1"]["bits"] == found["one"]["bits"]


def test_the_same_devices_give_the_same_bits(found):
    assert found["again"]["bits"] == found["4x1"]["bits"]


@pytest.mark.parametrize("mesh", ["4x1", "2x2"])
def test_every_device_searches_scales_of_its_share_of_the_channels(found, mesh):
    """Of 4 and of 6; one row is the histogram of an activation, and 4 are those of a group."""
    assert found["one"]["rows"] == [[1, 1], [4, 4], [6, 6]]
    assert found[mesh]["rows"] == [[4, 1], [8, 2]]


@pytest.mark.parametrize("devices", ["2", "4"])
def test_step_sizes_are_those_of_one_device(found, devices):
    """To the bit, where the float network's values are."""
    assert len(found["ranges"]["one"]["quantizers"]["all"][0]) == 7
    assert found["ranges"][devices] == found["ranges"]["one"]


@pytest.mark.parametrize("mesh", ["4x1", "2x2"])
def test_a_step_gathers_no_cache(found, mesh):
    assert found[mesh]["gathered"] == []
    assert found[mesh]["reduced"] > 0
    share = -(-22 // int(mesh[0]))  # of 22 samples, which 4 does not divide
    assert set(found[mesh]["caches"]) == {share}


@pytest.mark.parametrize("mesh", MESHES)
def test_every_device_computes_its_share_of_a_batch(found, mesh):
    assert set(found[mesh]["images"]) == {8 // int(mesh[0])}


@pytest.mark.parametrize("mesh", ["4x1", "2x2"])
def test_every_device_scores_its_share_of_a_batch(found, mesh):
    """Of eight samples; devices along the axis `model` too."""
    assert found[mesh]["scored"] == [2] * 4


@pytest.mark.parametrize(("mesh", "share"), [("4x1", 1), ("2x2", 2)])
def test_the_axis_model_splits_what_is_learned_of_the_weights(found, mesh, share):
    assert set(found[mesh]["shares"]) == {share}


def test_the_report_says_the_devices(found):
    assert found["one"]["devices"] == [1, 1, 1]
    assert found["4x1"]["devices"] == found["2x2"]["devices"] == [4, 4, 4]


def mesh_of_one(name="data"):
    return Mesh(np.array(jax.devices()[:1]), (name,))


def test_variables_may_be_scalars_and_random_keys():
    network, variables = small_net()
    given = variables | {"temperature": np.float32(2), "key": jax.random.key(0)}
    apply = lambda v, x: jnp.tanh(network(v, x)) * v["temperature"]  # noqa: E731
    recipe = aq.recipes.nearest(4, 4)
    run = functools.partial(aq.quantize, apply, given, images(0), recipe, observer=aq.Observer())
    np.testing.assert_array_equal(run(mesh=mesh_of_one())(images(0)), run()(images(0)))


def test_explicit_axes_in_force_are_an_error():
    explicit = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Explicit,))
    message = r"inside jax.set_mesh of another one with the explicit axes \('batch',\)"
    with jax.set_mesh(explicit), pytest.raises(aq.InputError, match=message):
        aq.quantize(*small_net(), images(0), aq.recipes.nearest(4, 4), mesh=mesh_of_one())


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (4, r"mesh is of type int; it must be a jax.sharding.Mesh, such as jax.make_mesh"),
        (("batch",), r"mesh has the axes \('batch',\); it must have \"data\""),
        (("model",), r"mesh has the axes \('model',\); it must have \"data\""),
    ],
)
def test_a_mesh_of_another_kind_is_an_error(mesh, message):
    if isinstance(mesh, tuple):
        mesh = mesh_of_one(*mesh)
    with pytest.raises(aq.InputError, match=message):
        aq.quantize(*small_net(), images(0), aq.recipes.nearest(4, 4), mesh=mesh)
