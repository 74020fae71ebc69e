"""A program of two processes of two CPU devices each, or of one of four: it quantizes, meets bad
input, and writes what it saw to WORKDIR/PROCESS.json. With --dies, one of them is killed."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

import aquant_jax as aq
from aquant_jax.reconstruction import hosts as shared
from aquant_jax.reconstruction import memory
from launch.lib import command_line, hosts, meshes
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


def in_less_memory(mesh, plan, process):
    """Codes and places of caches where not all of them fit on the devices."""
    for name in ("STEP_COPIES", "STATE_COPIES", "FORWARD_COPIES", "FORWARD_STATE_COPIES"):
        setattr(memory, name, 0)
    most = max(sum(block.caches) // plan.share for block in plan.blocks)
    # The first process has more, and processes of one machine share what there is.
    memory.free_bytes = lambda limit=None: 2 * most - 1 if process else 10**9
    watcher = Watcher()
    codes = run(mesh, None, observer=watcher)["codes"]
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
    if hosts.connected():
        found["again"] = run(mesh, store, observer=watchers[1])
        found["learned"] = [watcher.learned for watcher in watchers]
        found["messages"] = bad_input(mesh, values.workdir, process)
        found["less"] = in_less_memory(mesh, watchers[0].plan, process)
    Path(values.workdir, f"{process}.json").write_text(json.dumps(found))
    print("done")


if __name__ == "__main__":
    sys.exit(main())
