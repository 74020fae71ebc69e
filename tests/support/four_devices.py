"""A program of four CPU devices: it quantizes on meshes of them and prints what it saw, as JSON."""

import contextlib
import functools
import hashlib
import json
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import aquant_jax as aq
import gpu_ops
from aquant_jax.arithmetic import range_search
from aquant_jax.reconstruction import memory, optimize
from launch.lib import metrics
from tests.support import ir_contexts, searched_ranges
from tests.support.nets import conv, images, normal, rng_of

SAMPLES = 22  # which neither 4 devices nor batches of 8 divide
RECIPE = aq.recipes.aquant_plus(
    3, 8, steps=20, batch_size=8, finetune_steps=4, finetune_eval_every=1, quantize_input=True
)
FEW = aq.recipes.qdrop(3, 8, steps=8, batch_size=8)
IMAGES = re.compile(r"f32\[(\d+),7,7,3\]")  # padded operand of the convolution
CACHE = re.compile(r"= \w+\[2[24],.*(all-gather|all-to-all|collective-permute)\(")


class Losses(aq.Observer):
    """Keeps the loss of every step, and the numbers of devices that are reported."""

    def __init__(self):
        self.losses, self.devices = [], []

    def on_step(self, index, step, loss):
        self.losses.append(loss)

    def on_block_end(self, report):
        self.devices.append(report.devices)


class Spy(aq.Compiler):
    """Looks at the first step of every block: its program, and where its state lies."""

    def __init__(self):
        super().__init__(gpu_ops.backend())
        self.steps = {}
        self.gathered, self.reduced, self.shares, self.caches, self.images = [], 0, [], [], []

    def get(self, key, build, **options):
        function = super().get(key, build, **options)
        return functools.partial(self.step, key, function) if key[0] == "step" else function

    def step(self, key, function, carry, *others):
        if key in self.steps:
            return self.steps[key](carry, *others)
        self.steps[key] = compiled = function.lower(carry, *others).compile()
        text = compiled.as_text()
        self.gathered += [line for line in text.splitlines() if CACHE.search(line)]
        self.reduced += text.count(" all-reduce(")
        calls = [line for line in text.splitlines() if "custom-call(" in line]
        self.images += [int(n) for line in calls for n in IMAGES.findall(line)]
        self.caches += [len(c.values.addressable_shards[0].data) for c in others[1].targets]
        out = compiled(carry, *others)
        for alpha in out[0][0]["alpha"]:
            self.shares.append(alpha.size // alpha.addressable_shards[0].data.size)
        return out


def network():
    """A convolution and a dense layer: two blocks, and the whole-network stage."""
    rng = rng_of(0)
    variables = {"conv": normal(rng, 2, 2, 3, 4), "dense": normal(rng, 4, 6)}

    def apply(v, x):
        return jnp.mean(jax.nn.relu(conv(x, v["conv"])), (1, 2)) @ v["dense"]

    return apply, variables


def digest(arrays):
    return hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in arrays)).hexdigest()


def quantized(mesh, compiler=None, recipe=RECIPE):
    apply, variables = network()
    observer, x = Losses(), images(0, SAMPLES)
    result = aq.quantize(
        apply,
        variables,
        x,
        recipe,
        observer=observer,
        mesh=mesh,
        compiler=compiler or aq.Compiler(gpu_ops.backend()),
    )
    found = {"losses": observer.losses, "devices": observer.devices}
    outputs = np.asarray(result(x)).ravel().tolist()
    return found | {"bits": digest(jax.tree.leaves(result)), "outputs": outputs}


def scored(mesh):
    """How many of eight samples each device scores."""
    (apply, variables), shares, read = network(), [], metrics.read

    def recorded(logits):
        shares.extend(len(shard.data) for shard in logits.addressable_shards)
        return read(logits)

    metrics.read = recorded
    labels = np.arange(8) % 6
    metrics.evaluate_batches(lambda x: apply(variables, x), [(images(0, 8), labels)], mesh=mesh)
    metrics.read = read
    return shares


@contextlib.contextmanager
def little_memory():
    """Devices with memory of their own, in which half of the first block's weights fit."""
    sizes = {"free_bytes": lambda limit: 1.5e6, "STATE_COPIES": 11_000}
    apart = mock.patch.object(memory.devices, "share_memory", return_value=False)
    with apart, mock.patch.multiple(memory, **sizes):
        yield


def refused():
    """What one device with as little memory says."""
    with little_memory():
        try:
            quantized(None, recipe=FEW)
        except aq.InputError as error:
            return str(error)


def main():
    optimize.LOG_EVERY = 1
    drawn, draw = [], optimize.draw_batches
    rows, search = set(), range_search._around

    def recorded(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    def searched(operands, *arguments):
        rows.add((len(operands[0]), len(operands[0].addressable_shards[0].data)))
        return search(operands, *arguments)

    ir_contexts.share()
    ranges = {"one": searched_ranges.searched(None, ["samples"])}
    for count in (2, 4):
        mesh = jax.make_mesh((count,), ("data",), devices=jax.devices()[:count])
        ranges[str(count)] = searched_ranges.searched(mesh, ["samples"])
    optimize.draw_batches, range_search._around = recorded, searched
    found = {"one": quantized(None) | {"rows": sorted(rows)}, "ranges": ranges}
    for data, model in ((1, 1), (4, 1), (2, 2)):
        spy, drawn[:] = Spy(), []
        rows.clear()
        mesh = jax.make_mesh((data, model), ("data", "model"))
        with little_memory() if model > 1 else contextlib.nullcontext():
            result = quantized(mesh, spy)
        result |= {"gathered": spy.gathered, "reduced": spy.reduced}
        result |= {"shares": spy.shares, "caches": spy.caches, "images": spy.images}
        result |= {"batches": digest(drawn), "rows": sorted(rows), "scored": scored(mesh)}
        found[f"{data}x{model}"] = result
        if (data, model) == (4, 1):
            found["again"] = quantized(mesh, spy)
    found["2x1"] = {}
    for name, mesh in (("one", None), ("2x1", Mesh(np.array(jax.devices()[:2]), ("data",)))):
        drawn.clear()
        losses = quantized(mesh, recipe=FEW)["losses"]
        found[name] |= {"few": digest(drawn), "few_losses": losses}
    found["refused"] = refused()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
