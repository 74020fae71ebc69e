"""Step sizes that are searched on a mesh, of values that depend on no device, as JSON."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, get_mesh

import aquant_jax as aq
from aquant_jax.plan.block_program import make_block_program
from aquant_jax.reconstruction import devices, observe_ranges
from tests.support.nets import normal, rng_of

SAMPLES, BATCH, POSITIONS, CHANNELS = 22, 8, 3, 8
LAYERS = 7  # of the tensors, one has both signs, and the last of the others fewer bits
DRAWN = 100  # elements of a tensor, of 528
RECIPE = aq.recipes.nearest(4, 8, batch_size=BATCH, last_act_bits=4, quantize_input=True)


def _split_channels(values):
    spec = PartitionSpec(None, None, get_mesh().axis_names)
    return devices.put(values, NamedSharding(get_mesh(), spec))


PLACES = {
    "samples": devices.split_samples,
    "everywhere": devices.everywhere,
    "channels": _split_channels,
}


def searched(mesh, places=tuple(PLACES)):
    """The quantizers with values in each of these places of a mesh, of all elements and of drawn
    ones; the shapes of what processes sent each other, and how many elements this one counted."""
    net, sent, counted = network(), [], []
    gather, most = multihost_utils.process_allgather, observe_ranges.MOST_ELEMENTS

    def recorded(values, **options):
        sent.append(np.shape(values))
        if np.ndim(values) == 3:
            counted.append(values.view(np.float64)[:, 0].sum())
        return gather(values, **options)

    multihost_utils.process_allgather = recorded
    found = {}
    with devices.in_force(mesh):
        for name, observe_ranges.MOST_ELEMENTS in (("all", most), ("drawn", DRAWN)):
            for place in places:
                quantizers = search(net, PLACES[place])
                ranges = {key: list(map(float, pair)) for key, pair in quantizers.items()}
                found.setdefault(name, []).append(ranges)
    observe_ranges.MOST_ELEMENTS, multihost_utils.process_allgather = most, gather
    return {"quantizers": found, "sent": sorted(set(sent)), "counted": counted}


def network():
    """Dense layers on sequences with padding."""
    variables = [normal(rng_of(i), CHANNELS, CHANNELS) for i in range(LAYERS)]
    mask = np.arange(POSITIONS)[None] <= rng_of(0).integers(0, POSITIONS, (SAMPLES, 1))
    x = {"mask": mask.astype(np.int32), "x": normal(rng_of(0), SAMPLES, POSITIONS, CHANNELS)}

    def apply(variables, inputs):
        h = inputs["x"] * inputs["mask"][..., None].astype(np.float32)
        for weight in variables[:-1]:
            h = jax.nn.relu(h @ weight)
        return h @ variables[-1]

    return aq.prepare(apply, variables, x, RECIPE, mask="mask")


def search(net, place):
    """Quantizers of random values; one tensor has both signs."""
    program = make_block_program(net.graph, net.plan, (), net.graph.outputs)

    def run_float(probe):
        rng = rng_of(1)
        assert [len(axes) for axes in probe.position_axes] == [1] * LAYERS
        for start in range(0, SAMPLES, BATCH):
            rows = (start + np.arange(BATCH)) % SAMPLES
            outputs = [normal(rng, BATCH, POSITIONS, CHANNELS) for _ in range(LAYERS)]
            outputs[1:] = [np.maximum(values, 0.0) for values in outputs[1:]]
            for values in outputs:
                values[~net.valid_mask[rows]] = np.nan  # padding
            yield rows, [place(values) for values in outputs]

    return observe_ranges.observe_ranges(net, [program], run_float)
