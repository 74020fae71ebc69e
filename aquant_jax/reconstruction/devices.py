"""The devices of a quantization: samples are split over them, and the channels of large weights.

Programs are those of one device. Arrays say how they are split, and XLA adds what the devices send
to each other: in a step, the samples of its batch and the sums of the loss and of the gradients.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh, get_mesh

from aquant_jax.errors import InputError, check_type
from aquant_jax.graph.ir import Layer, path_names
from aquant_jax.plan.network import Network, take_samples
from aquant_jax.plan.shared_samples import SharedSamples
from aquant_jax.recipe import Recipe

# Axes of a caller's mesh, and their names while it is in force: one that the caller has in force
# for another purpose is not meant.
DATA, MODEL = "data", "model"
NAMES = {DATA: "aquant_data", MODEL: "aquant_model"}


def check_mesh(mesh: Any) -> None:
    """InputError unless `mesh` is None, or a mesh with an axis "data", and perhaps one "model", of
    devices of this process or of all, and no mesh with explicit axes, to which traced operations
    belong, is in force."""
    if mesh is None:
        return
    wanted = f'a jax.sharding.Mesh, such as jax.make_mesh((4,), ("{DATA}",))'
    check_type("mesh", mesh, Mesh, wanted)
    if DATA not in mesh.axis_names or not set(mesh.axis_names) <= {DATA, MODEL}:
        raise InputError(
            f'mesh has the axes {mesh.axis_names}; it must have "{DATA}", and may have "{MODEL}"'
        )
    _check_processes(mesh)
    if AxisType.Explicit in (get_abstract_mesh().axis_types or ()):
        raise InputError(
            f"mesh is given inside jax.set_mesh of another one with the explicit axes "
            f"{get_abstract_mesh().axis_names}; call quantize outside"
        )


def _check_processes(mesh: Mesh) -> None:
    """InputError where a mesh of several processes lacks one, or one has other devices than it."""
    if not mesh.is_multi_process:
        return
    found = sorted({device.process_index for device in mesh.devices.flat})
    if len(found) < jax.process_count():
        raise InputError(
            f"mesh has devices of the processes {found} of {jax.process_count()}; it must have "
            f"those of one, or of all"
        )
    owners = collections.Counter(device.process_index for device in jax.devices())
    most, least = max(owners, key=owners.__getitem__), min(owners, key=owners.__getitem__)
    if owners[most] != owners[least]:
        raise InputError(
            f"process {least} has {owners[least]} devices and process {most} has {owners[most]}; "
            f"every process must have as many"
        )


def check_batch(mesh: Mesh | None, size: int) -> None:
    """InputError where the devices of a checked `mesh` do not divide the `size` of a batch."""
    devices = mesh.shape[DATA] if mesh else 1
    if size % devices:
        raise InputError(
            f"mesh: a batch of {size} samples cannot be split evenly over {devices} devices; "
            f"choose a batch_size that {devices} divides"
        )


def in_force(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """While it lasts, the functions below split samples over `mesh`, and new arrays lie on it."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.set_mesh(Mesh(mesh.devices, tuple(NAMES[name] for name in mesh.axis_names)))


def count() -> int:
    """The number of devices of the mesh in force, or 1."""
    return max(1, _devices(DATA)) * max(1, _devices(MODEL))


def share_memory() -> bool:
    """Whether the devices of a process share its memory."""
    return jax.default_backend() == "cpu"


def on_host(net: Network) -> Network:
    """A network with its arrays in numpy, from which they can be moved to any device."""
    arrays = net.variables, net.folded, net.graph.constants
    variables, folded, constants = jax.tree.map(_in_numpy, arrays)
    graph = net.graph._replace(constants=constants)
    return net._replace(variables=variables, folded=folded, graph=graph)


def several_processes() -> bool:
    """Whether the mesh in force has devices of several processes."""
    return bool(_devices(DATA)) and get_mesh().is_multi_process


def read(leaf: Any) -> Any:
    """The whole of an array on the host; all processes that have a part of it call this together.
    Anything that numpy cannot hold stays as it is."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return multihost_utils.process_allgather(leaf, tiled=True)
    return _in_numpy(leaf)


def parts(array: Any) -> list[tuple[tuple[slice, ...], np.ndarray]]:
    """The parts of an array that this process answers for, behind their places in it. Each element
    is in one part of one process; one process alone has the whole."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
        return [(shard.index, np.asarray(shard.data)) for shard in shards]
    return [((slice(None),) * array.ndim, np.asarray(array))]


def of_processes(values: np.ndarray) -> np.ndarray:
    """The float64 `values` of every process of the mesh in force, along a new first axis; all call
    this together, with the same shape."""
    if not several_processes():
        return values[None]
    words = values.view(np.uint32)  # JAX would round float64
    return np.asarray(multihost_utils.process_allgather(words)).view(np.float64)


def shared(calibration: Any, mesh: Mesh | None, recipe: Recipe, mask: str | None) -> Any:
    """A calibration set that a process can read; where its rows lie split along the axis "data" of
    a mesh of several processes, they stay there, but for the first few and those of the mask."""
    if mesh is None or not mesh.is_multi_process:
        return calibration
    split = NamedSharding(mesh, PartitionSpec(DATA))
    first = recipe.reconstruction.init_samples + recipe.reconstruction.batch_size

    def leaf(name: str, array: Any) -> Any:
        if not isinstance(array, jax.Array) or not array.ndim or array.is_fully_addressable:
            return array
        if not array.sharding.is_equivalent_to(split, array.ndim):
            return read(array)
        return SharedSamples(array, len(array) if name == mask else first)

    leaves, structure = jax.tree.flatten(calibration)
    return structure.unflatten(map(leaf, path_names(calibration), leaves))


def whole(tree: Any, mesh: Mesh | None) -> Any:
    """A pytree of arrays that a process can read, on a mesh of several: see `read`."""
    return jax.tree.map(read, tree) if mesh is not None and mesh.is_multi_process else tree


def everywhere(tree: Any) -> Any:
    """A pytree of arrays, on every device of the mesh in force."""
    return put(tree, _sharding()) if _devices(DATA) else jax.device_put(tree)


def put(tree: Any, sharding: NamedSharding) -> Any:
    """A pytree of arrays, split over devices. Of several processes, each has the whole, and moves
    the parts of its own devices."""
    if not isinstance(sharding.mesh, Mesh) or not sharding.mesh.is_multi_process:
        return jax.device_put(tree, sharding)

    def split(leaf: Any) -> jax.Array:
        values = read(leaf)
        if isinstance(values, jax.Array):  # of random keys
            return jax.device_put(values, sharding)
        values = np.asarray(values, jnp.result_type(values))
        return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)

    return jax.tree.map(split, tree)


def unplaced(tree: Any) -> Any:
    """The arrays of a pytree on the default device, free to be used with arrays on others."""

    def place(leaf: Any) -> Any:
        host = read(leaf)
        return leaf if host is leaf else jnp.asarray(host)

    return jax.tree.map(place, tree)


def empty(samples: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """An array of `samples` or a few more, so that the devices have as many each."""
    if not _devices(DATA):
        return jnp.empty((samples, *shape), dtype)
    rows = _filled_up(samples, _devices(DATA))
    return jnp.zeros((rows, *shape), dtype, device=_sharding(NAMES[DATA]))


def on_hosts(leaf: Any) -> Any:
    """A leaf of the calibration set as the caller has it, but whole in every process."""
    return leaf.gather(len(leaf)) if isinstance(leaf, SharedSamples) else leaf


def split_samples(leaf: Any) -> jax.Array:
    """A leaf of the calibration set, its samples split as those of `empty`; a scalar is whole."""
    if not _devices(DATA) or not np.ndim(leaf):
        return jnp.asarray(leaf)
    if isinstance(leaf, SharedSamples):  # in its place, under the name of the axis in force
        parts = [shard.data for shard in leaf.array.addressable_shards]
        there = _sharding(NAMES[DATA])
        return jax.make_array_from_single_device_arrays(leaf.shape, there, parts)
    return _split(leaf, _devices(DATA), NAMES[DATA])


def split_rows(values: np.ndarray) -> jax.Array:
    """An array, its rows split over all devices, whatever their axis, and repeated to fill them."""
    if not _devices(DATA):
        return jnp.asarray(values)
    return _split(values, count(), get_mesh().axis_names)


def split_batch(values: jax.Array) -> jax.Array:
    """The samples of a batch, split over the devices if they divide them."""
    devices = _devices(DATA)
    if not devices or len(values) % devices:
        return values
    return jax.lax.with_sharding_constraint(values, PartitionSpec(NAMES[DATA]))


def split_channels(weight: Any, axes: Sequence[int]) -> jax.Array:
    """A weight, split along the first of its output channel axes that the devices divide."""
    axis = _split_axis(weight.shape, axes)
    if axis is None:
        return jnp.asarray(weight)
    return put(weight, _sharding(*[None] * axis, NAMES[MODEL]))


def channel_devices(layer: Layer) -> int:
    """The number of devices that `split_channels` splits the weight of a layer over."""
    axis = _split_axis(layer.weight_shape, layer.channel_axes)
    return 1 if axis is None else _devices(MODEL)


def take_batch(leaf: Any, index: Any) -> Any:
    """The samples of an input at `index`, split; a scalar belongs to all of them."""
    return split_batch(take_samples(leaf, index)) if np.ndim(leaf) else leaf


def write(array: jax.Array, batch: jax.Array, position: jax.Array | int) -> jax.Array:
    """`array`, of `empty`, with the samples of a batch from `position` on, as far as it goes."""
    if not _devices(DATA):
        return jax.lax.dynamic_update_slice_in_dim(array, batch, position, 0)
    rows = position + jnp.arange(len(batch))  # a slice of split rows would be gathered first
    return array.at[rows].set(batch, mode="drop")


def settled(values: Any) -> Any:
    """`values`, when they are computed, on a mesh of CPU devices: XLA has a few programs at most in
    flight on each, and with more of them the devices may wait for each other without end."""
    if _devices(DATA) and jax.default_backend() == "cpu":
        jax.block_until_ready(values)
    return values


def _in_numpy(leaf: Any) -> Any:
    """A leaf in numpy, if it is an array of JAX that numpy can hold: one of random keys is not."""
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(leaf) if isinstance(leaf, jax.Array) and not is_key else leaf


def _devices(axis: str) -> int:
    """How many devices of the mesh in force an axis has; 0 without such an axis."""
    return dict(get_abstract_mesh().shape).get(NAMES[axis], 0)


def _split_axis(shape: Sequence[int], axes: Sequence[int]) -> int | None:
    """The first of a weight's output channel axes that the devices divide, if any."""
    devices = _devices(MODEL)
    return next((axis for axis in axes if devices and shape[axis] % devices == 0), None)


def _split(values: Any, devices: int, axes: str | Sequence[str]) -> jax.Array:
    """An array, its rows split over the devices of these axes, and repeated to fill them."""
    rows = np.resize(values, (_filled_up(len(values), devices), *values.shape[1:]))
    return put(rows, _sharding(axes))


def _filled_up(rows: int, devices: int) -> int:
    """The least number from `rows` on that the devices divide."""
    return devices * math.ceil(rows / devices)


def _sharding(*axes: str | Sequence[str] | None) -> NamedSharding:
    return NamedSharding(get_mesh(), PartitionSpec(*axes))
