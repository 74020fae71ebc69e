"""Several processes, on one machine or many, that run one program together.

``jax.distributed`` connects them. Its client ends the process from native code when another one
dies or the coordinator is out of reach: no handler in Python sees it. So the program runs in a
child of the process that the user started, which turns such an end into one line (`supervisor`).

The first process writes and prints. The failure of any is published, and ends all.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
from absl import flags, logging
from jax._src import clusters, distributed  # no public part of JAX has the client's messages

from aquant_jax.errors import InputError, SharedError
from aquant_jax.reconstruction import hosts
from launch.lib import run_directory, supervisor
from launch.lib.run_directory import RunDirectory

HEARTBEAT = 30  # seconds without which a process counts as dead
PATIENCE = HEARTBEAT + 15  # seconds to wait for the cause of a failed communication
PARTING = 5_000  # milliseconds to wait for the others at the end of a failed program
FOREVER = 2**31 - 1  # milliseconds
FAILURE, DONE = "aquant failure", "aquant done"
AGAIN = "run the command again: it resumes after the last finished block"
_DEAD = re.compile(r"stopped sending heartbeats\):\n((?:\d+\n)+)")  # numbers of processes
_ending = threading.Lock()  # taken once


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags that connect processes."""
    text = "one of several, found from Slurm, Open MPI, Kubernetes or Cloud TPU"
    flags.DEFINE_boolean("distributed", False, text, flag_values=values)
    text = "HOST:PORT of process 0, where nothing else tells it"
    flags.DEFINE_string("coordinator", None, text, flag_values=values)
    flags.DEFINE_integer("processes", None, "how many there are", 1, flag_values=values)
    flags.DEFINE_integer("process", None, "number of this one, from 0", 0, flag_values=values)
    text = "seconds to wait for all processes at the start"
    flags.DEFINE_integer("connect_timeout", 300, text, 1, flag_values=values)


class Job(NamedTuple):
    """The place of this process among all.

    Attributes:
        address: of the coordinator, HOST:PORT.
        processes: how many there are.
        process: number of this one.
        devices: numbers of its devices on this machine; None takes all.
    """

    address: str
    processes: int
    process: int
    devices: Any = None


def join(values: Any) -> None:
    """Connects this process with the others that its flags name, if any.

    The program goes on in a child of this process; see `supervisor`.

    Raises:
        InputError: the flags are incomplete.
        SystemExit: in the parent, when the program has ended.
    """
    job = _job(values)
    if job is None:
        return
    timeout = values.connect_timeout
    explain = functools.partial(_explain, job, timeout)
    supervisor.run_in_child(job.process == 0, explain)
    if job.process:
        logging.set_verbosity(logging.FATAL)
    jax.config.update("jax_enable_preemption_service", False)  # it would ignore SIGTERM
    jax.distributed.initialize(
        *job, initialization_timeout=timeout, heartbeat_timeout_seconds=HEARTBEAT
    )
    threading.Thread(target=_watch, daemon=True).start()


def _job(values: Any) -> Job | None:
    names = ("coordinator", "processes", "process")
    given = {name: values[name].value for name in names if values[name].value is not None}
    if not given and not values.distributed:
        return None
    found: Any = (*map(given.get, names), None)
    if values.distributed:
        found = (found[0] or os.environ.get("JAX_COORDINATOR_ADDRESS"), *found[1:])
        detect: Any = clusters.ClusterEnv.auto_detect_unset_distributed_params
        found = detect(*found, None, values.connect_timeout)
    missing = [f"--{name}" for name, value in zip(names, found, strict=False) if value is None]
    if missing:
        cluster = "--distributed finds no cluster here; " if values.distributed else ""
        raise InputError(f"{cluster}give {' and '.join(missing)}, or run it by Slurm or Open MPI")
    job = Job(*found)
    if not job.address.rpartition(":")[2].isdecimal():
        raise InputError(f"--coordinator={job.address}: it must be HOST:PORT")
    if job.process >= job.processes:
        raise InputError(f"--process={job.process} of --processes={job.processes}: count from 0")
    return job


@contextlib.contextmanager
def claim(path: str, identity: dict[str, Any], restart: bool) -> Iterator[RunDirectory]:
    """`run_directory.claim` of the first process, after all agree on `identity`.

    The others get what it found there, and must not write.
    """
    with contextlib.ExitStack() as stack:
        own = run_directory.claim(path, identity, restart=restart)
        if not connected():
            yield stack.enter_context(own)
            return
        place = {"data_dir": None}  # may have another name on every machine
        hosts.check_same({**identity, **place, "restart": restart})
        held = hosts.together(lambda: stack.enter_context(own) if is_first() else None, True)
        stored = hosts.exchange(held and held.stored)[0]
        yield held or RunDirectory(Path(path), stored)


def connected() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return not connected() or hosts.is_first()


def leave(code: int) -> NoReturn:
    """Ends this process when all have done their part."""
    _client().wait_at_barrier(DONE, FOREVER)
    jax.distributed.shutdown()
    _exit(code)


def fail(code: int, error: BaseException, message: str) -> NoReturn:
    """Ends all processes, as this one failed; the first prints one line."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        time.sleep(PATIENCE)  # of another process, which JAX finds, or which publishes its own
    if is_first() or not isinstance(error, SharedError):
        if not isinstance(error, SharedError):
            process = hosts.name_of(jax.process_index(), socket.gethostname())
            message = f"{process}: {message}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first
            _client().key_value_set(FAILURE, json.dumps([code, message]))
    _end(PATIENCE * 1_000)
    _exit(code)


def _watch() -> None:
    """Waits for a failure in a thread of its own: the main one may wait for the failed process."""
    _end(FOREVER)


def _end(timeout: int) -> None:
    """Ends this process for the failure that is published within milliseconds, if one is."""
    try:
        code, message = json.loads(_client().blocking_key_value_get(FAILURE, timeout))
    except jax.errors.JaxRuntimeError:  # none, or this process has left
        return
    _ending.acquire()
    if is_first():
        print(f"error: {message}", file=sys.stderr)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().wait_at_barrier(FAILURE, PARTING)
    _exit(code)


def _client() -> Any:
    return distributed.global_state.client


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _explain(job: Job, timeout: int, log: str, end: str) -> str | None:
    """Why a process was ended by a signal, in one line; None where the first process says it.

    Args:
        job: of the process.
        timeout: seconds that it had to connect.
        log: of JAX's client.
        end: name of the signal.
    """
    if not log:
        return f"process {job.process} on {socket.gethostname()} was ended by {end}"
    if "RegisterTask" in log:
        return (
            f"process {job.process}: no coordinator answered at {job.address} within {timeout} s, "
            f"or not all {job.processes} processes came"
        )
    if "Failed to send RPC to coordination service" in log:
        return f"process 0, the coordinator {job.address}, ended or cannot be reached; {AGAIN}"
    if job.process:
        return None
    dead = _DEAD.search(log)
    names = " and ".join(dead[1].split()) if dead else "of unknown number"
    return f"process {names} ended, or cannot be reached; {AGAIN}"
