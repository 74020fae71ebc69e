"""A program of two processes of two CPU devices each, or of one of four: it quantizes, meets bad
input, and writes what it saw to WORKDIR/PROCESS.json. With --dies, one of them is killed."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

import aquant_jax as aq
from aquant_jax import data
from aquant_jax.reconstruction import hosts as shared
from aquant_jax.reconstruction import memory
from launch.lib import command_line, hosts, meshes, shares
from tests.support import searched_ranges
from tests.support.nets import mlp, normal, rng_of

RECIPE = aq.recipes.qdrop(3, 8, steps=4, batch_size=8)
NEAREST = aq.recipes.nearest(3, 8, batch_size=8)
OTHER_STEPS = aq.recipes.qdrop(3, 8, steps=8, batch_size=8)
SAMPLES = 22


def define_flags(values):
    hosts.define_flags(values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_integer("dies", None, "number of a process", flag_values=values)
    flags.DEFINE_boolean("fails", False, "", flag_values=values)


class Watcher(aq.Observer):
    """Counts the blocks that are learned, or kills the parent at the second, and waits for it."""

    def __init__(self, kills=False):
        self.kills, self.learned, self.plan = kills, 0, None

    def on_memory(self, plan):
        self.plan = plan

    def on_block_start(self, index, block):
        self.learned += 1
        if self.kills and index == 1:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(300)


def run(mesh, store, samples=None, recipe=RECIPE, observer=None):
    """Codes and numbers of devices, or the message of an error."""
    network, variables = mlp(sizes=(6, 8, 4))
    x = normal(rng_of(1), SAMPLES, 6) if samples is None else samples
    observer = observer or aq.Observer()
    try:
        result = aq.quantize(
            network, variables, x, recipe, mesh=mesh, resume=store, observer=observer
        )
    except aq.InputError as error:
        return str(error)
    codes = [np.asarray(layer.codes).tolist() for layer in result.layers.values()]
    return {"codes": codes, "devices": [report.devices for report in result.reports]}


def read_shares(mesh, workdir, x):
    """Calibration samples, of which every process reads its share, and the numbers of the rows that
    this one reads."""
    read = []

    def stream(split, indices, seed, size, on_corrupt):
        read.extend(indices.tolist())
        yield data.Split(x[indices], np.zeros(len(indices)))

    rows = data.Dataset("rows", 2, len(x), 0, stream)
    of = SimpleNamespace(calibration=rows, check=len, mesh=mesh, memory_limit=None)
    return shares.read_calibration(of, len(x), 0, Path(workdir), None, 5), read


def of_shares(mesh, workdir):
    """What a process reads of its share, and the codes and the fingerprint that come of it."""
    store = Path(workdir, "shares")
    calibration, read = read_shares(mesh, workdir, normal(rng_of(1), 24, 6))
    recipe = RECIPE.replace(transforms=("shift_scale",))
    found = run(mesh, store, calibration.inputs, recipe)
    known = json.loads((store / "fingerprint.json").read_text())["call"]["calibration"]
    found |= {"read": read, "few": calibration.few.tolist(), "fingerprint": known}
    if hosts.connected():
        process = jax.process_index()
        found["less"] = in_less_memory(mesh, 0, process, calibration.inputs, recipe)
    return found


def in_less_memory(mesh, most, process, samples=None, recipe=RECIPE):
    """Codes and places of caches where `most` bytes of them fit on the devices, less one."""
    names = ("STEP_COPIES", "STATE_COPIES", "FORWARD_COPIES", "FORWARD_STATE_COPIES")
    watcher = Watcher()
    # The first process has more, and processes of one machine share what there is.
    free = max(2 * most - 1, 0) if process else 10**9
    with mock.patch.multiple(memory, **dict.fromkeys(names, 0), free_bytes=lambda limit: free):
        codes = run(mesh, None, samples, recipe, watcher)["codes"]
    return {"codes": codes, "places": watcher.plan.places}


def bad_input(mesh, workdir, process):
    """What differs on the second process, and the message of every process."""
    x = normal(rng_of(1), SAMPLES, 6)
    with np.errstate(invalid="ignore"):
        messages = {
            "data": run(mesh, None, x + process),
            "recipe": run(mesh, None, recipe=[RECIPE, OTHER_STEPS][process]),
            "nan": run(mesh, None, x * (np.nan if process else 1)),
            "folder": run(mesh, f"{workdir}/elsewhere/{process}"),
        }
        x[:] = np.nan if process else x
        messages["share"] = run(mesh, None, read_shares(mesh, workdir, x[:20])[0].inputs)
    with mock.patch.object(shared, "code", return_value=f"code {process}"):
        messages["code"] = run(mesh, None)
    try:
        meshes.parse("2")
    except aq.InputError as error:
        messages["mesh"] = str(error)
    if process:
        messages["part"] = run(Mesh(np.array(jax.devices()[:1]), ("data",)), None)
    return messages


@command_line.program
def main(argv):
    values, _ = command_line.parse(argv, define_flags, None)
    hosts.HEARTBEAT = 10
    hosts.join(values)
    process = jax.process_index()
    mesh, store = meshes.parse(meshes.AUTO), f"{values.workdir}/blocks"
    if values.fails and process:
        raise aq.InputError("no such weights")
    watchers = Watcher(process == values.dies), Watcher()
    recipe = RECIPE if values.dies is None else NEAREST
    found = run(mesh, store, recipe=recipe, observer=watchers[0])
    found["ranges"] = searched_ranges.searched(mesh)
    found["shares"] = of_shares(mesh, values.workdir) if values.dies is None else {}
    if hosts.connected():
        found["again"] = run(mesh, store, observer=watchers[1])
        found["learned"] = [watcher.learned for watcher in watchers]
        found["messages"] = bad_input(mesh, values.workdir, process)
        plan = watchers[0].plan
        most = max(sum(block.caches) // plan.share for block in plan.blocks)
        found["less"] = in_less_memory(mesh, most, process)
    Path(values.workdir, f"{process}.json").write_text(json.dumps(found))
    print("done")


if __name__ == "__main__":
    sys.exit(main())
