"""The runs of a sweep as tasks of a Ray cluster.

A run (one seed of a cell) is a task in a process of its own: JAX keeps the memory of the devices
that it has seen until its process ends. Workers import the checkout of the driver and write into
its workdir, so both lie on a file system that every node sees at the same path. They get the
settings of JAX and XLA from the driver's environment, and nothing else of it.

A task whose worker died is submitted again, by the driver and not by Ray (``max_retries``): so it
is logged, and a run that outgrows the memory of its node ends too, which Ray would repeat forever.
"""

import collections
import contextlib
import importlib
import logging as standard_logging
import math
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from jax.sharding import Mesh

import launch
from aquant_jax.errors import InputError, ReconstructionError, install_command, reason
from aquant_jax.storage.folder_lock import FolderInUseError
from launch.lib import cells, meshes, process
from launch.lib.results import one_line
from launch.lib.run_directory import RESULTS

Ray = Any  # the module, which need not be installed
THIS_MACHINE = "local"  # as Ray calls an address: a cluster that starts and ends with the program
RETRIES = 3  # of a run whose worker died
CONNECT = 10.0  # seconds until an address counts as unreachable
CANCEL = 60.0  # seconds that a run has to reach the end of a step when it is cancelled
# Seconds until a folder counts as in use by somebody else. The kernel frees the folder of a worker
# that died at once, an NFS server that of a machine that died after its lease, often 90 s.
FREED = 120.0
FORWARDED = ("JAX_", "XLA_", "LIBTPU_", "NPROC")  # variables of the driver that start so


class Tasks(NamedTuple):
    """What the flags say about tasks.

    Attributes:
        address: of the cluster, as ``ray.init`` takes it.
        cpus: of each.
        gpus: of each; None for those of the mesh where the cluster has GPUs.
        mesh: value of ``--mesh``, of the devices of a worker.
        data_dir: of the configs.
        memory_limit: of a run, see ``aquant_jax.quantize``.
        command: line of the driver, for the results and the reports.
    """

    address: str
    cpus: int
    gpus: int | None
    mesh: str | None
    data_dir: str
    memory_limit: int | None = None
    command: str | None = None


class Run(NamedTuple):
    """One seed of a cell; ``folder`` is that of the network."""

    folder: Path
    cell: cells.Cell
    seed: int

    @property
    def path(self) -> Path:
        return cells.path_of(self.folder, self.cell.name, self.seed)


def find_address(flag: str | None) -> str:
    """The address of the cluster: of ``--ray_address``, ``RAY_ADDRESS``, or a new one here."""
    return flag or os.environ.get("RAY_ADDRESS") or THIS_MACHINE


def check(tasks: Tasks) -> None:
    """Says what is wrong before anything is claimed.

    Raises:
        InputError: Ray is not installed, ``--mesh`` is malformed, or needs more GPUs than a task
            has.
    """
    _import(tasks.address)
    devices = _devices(tasks.mesh)
    if tasks.gpus and devices > tasks.gpus:
        raise InputError(
            f"--mesh={tasks.mesh} needs {devices} devices, and --gpus_per_cell={tasks.gpus}"
        )


def run(
    tasks: Tasks, planned: dict[Path, list[cells.Cell]], seeds: list[int]
) -> dict[Path, cells.Results]:
    """Runs what is not finished on the cluster; prints a line for every finished run.

    Args:
        tasks: of the flags.
        planned: the cells of each network, by the folder of their runs.
        seeds: of every cell.

    Returns:
        The results of ``cells.run`` of every folder.

    Raises:
        InputError: the cluster cannot be reached, or is too small; whatever a run raises.
        ReconstructionError: the worker of a run died too often.
    """
    runs = [
        Run(folder.resolve(), cell, seed)
        for folder, of_network in planned.items()
        for cell in of_network
        for seed in seeds
    ]
    finished = [run for run in runs if (run.path / RESULTS).exists()]
    found = {run.path: _in_process(run, tasks, None) for run in finished}
    missing = [run for run in runs if run.path not in found]
    if missing:
        with _connected(tasks.address) as ray:
            found |= _run_all(ray, missing, tasks)
    results = iter([found[run.path] for run in runs])
    return {
        folder: {cell.name: [next(results) for _ in seeds] for cell in of_network}
        for folder, of_network in planned.items()
    }


def run_in_worker(run: Run, tasks: Tasks) -> dict[str, Any]:
    """One run, in a worker; waits for its folder where a worker before it is still dying.

    Raises:
        FolderInUseError: it is still in use after `FREED` seconds.
    """
    process.keep_freed_memory()
    process.keep_compiled_programs()
    process.keep_command(tasks.command)
    end = time.monotonic() + FREED
    with process.progress_on_stderr():
        while True:
            try:
                return _in_process(run, tasks, meshes.parse(tasks.mesh))
            except FolderInUseError:
                if time.monotonic() > end:
                    raise
            time.sleep(1)


def _in_process(run: Run, tasks: Tasks, mesh: Mesh | None) -> dict[str, Any]:
    one = [run.cell], [run.seed]
    results = cells.run(run.folder, tasks.data_dir, *one, mesh, tasks.memory_limit)
    return results[run.cell.name][0]


def _run_all(ray: Ray, runs: Sequence[Run], tasks: Tasks) -> dict[Path, dict[str, Any]]:
    """Submits all runs; their results by their paths."""
    remote = ray.remote(max_calls=1, max_retries=0)(run_in_worker).options(**_options(ray, tasks))
    running = {remote.remote(run, tasks): run for run in runs}
    results: dict[Path, dict[str, Any]] = {}
    deaths = collections.Counter[Path]()
    try:
        while running:
            [task], _ = ray.wait(list(running))
            run = running.pop(task)
            try:
                results[run.path] = ray.get(task)
                print(one_line(results[run.path], run.path), flush=True)
            except ray.exceptions.RayTaskError as error:  # which a run raised
                raise error.cause or error from error
            except ray.exceptions.RayError as error:
                deaths[run.path] += 1
                name, times = run.path.name, deaths[run.path]
                if times > RETRIES:
                    said = f"{name}: its worker died {times} times, at last by: {reason(error)}"
                    raise ReconstructionError(said) from error
                logging.warning("%s: %s Retry %d of %d", name, reason(error), times, RETRIES)
                running[remote.remote(run, tasks)] = run
    finally:
        _cancel(ray, list(running))
    return results


def _cancel(ray: Ray, tasks: list[Any]) -> None:
    """Ends what still runs, in the middle of a block, as Ctrl-C does."""
    if not tasks:
        return
    for task in tasks:
        ray.cancel(task)
    _, stuck = ray.wait(tasks, num_returns=len(tasks), timeout=CANCEL)
    for task in stuck:
        ray.cancel(task, force=True)


def _options(ray: Ray, tasks: Tasks) -> dict[str, Any]:
    """The CPUs, the GPUs and the environment of a task.

    Raises:
        InputError: no node of a cluster that started here has so many.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = int(max(node.get("GPU", 0) for node in nodes))
    gpus = tasks.gpus
    if gpus is None:
        gpus = _devices(tasks.mesh) if most else 0
    if not any(node.get("CPU", 0) >= tasks.cpus and node.get("GPU", 0) >= gpus for node in nodes):
        largest = ", ".join(sorted({f"{n.get('CPU', 0):g} and {n.get('GPU', 0):g}" for n in nodes}))
        said = f"no node has the {tasks.cpus} CPUs and {gpus} GPUs of a cell; nodes have {largest}"
        if tasks.address == THIS_MACHINE:
            raise InputError(said)
        logging.warning("%s; waiting until one joins the cluster", said)  # autoscaling
    logging.info(
        "Ray: %g CPUs and %g GPUs on %d nodes; a cell has %d and %d",
        sum(node.get("CPU", 0) for node in nodes), sum(node.get("GPU", 0) for node in nodes),
        len(nodes), tasks.cpus, gpus,
    )  # fmt: skip
    environment = _environment()
    if most and not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # as Ray leaves all of them visible
    return {"num_cpus": tasks.cpus, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}


def _environment() -> dict[str, str]:
    """The settings of JAX here, so that a worker gets the same bits, and where our code is."""
    checkout = str(Path(launch.__path__[0]).resolve().parent)
    given = os.environ.get("PYTHONPATH")
    found = {name: text for name, text in os.environ.items() if name.startswith(FORWARDED)}
    return {**found, "PYTHONPATH": os.pathsep.join(filter(None, [checkout, given]))}


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Ray]:
    """Ray, connected to a cluster.

    Raises:
        InputError: there is none at the address.
    """
    ray = _import(address)
    match = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address)
    try:
        if match:  # Ray itself tries for minutes
            socket.create_connection((match[1], int(match[2])), CONNECT).close()
        ray.init(
            address, include_dashboard=False, log_to_driver=False,
            logging_level=standard_logging.ERROR,
        )  # fmt: skip
    except (OSError, OverflowError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise InputError(f"no Ray cluster at {address}: {reason(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _import(address: str) -> Ray:
    """Ray, set up before its import; what the user's environment says counts more."""
    settings = {"RAY_USAGE_STATS_ENABLED": "0"}
    if address == THIS_MACHINE:  # closed to everybody else
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # listens on 127.0.0.1 alone
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    else:
        settings["RAY_gcs_server_port_wait_time_s"] = "1"  # one attempt, of 40 seconds
    for name, text in settings.items():
        os.environ.setdefault(name, text)
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise InputError(f"--executor=ray needs Ray: {install_command('cluster')}") from error


def _devices(mesh: str | None) -> int:
    """That a value of ``--mesh`` needs at least."""
    return math.prod((meshes.sizes(mesh) if mesh else None) or (1,))
