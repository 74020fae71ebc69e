"""`quantize` and `quantize_seeds`: the main loop of the library, one block after another."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from aquant_jax.arithmetic.border import AUTO
from aquant_jax.deployment.assemble import assemble
from aquant_jax.deployment.quantized import Quantized
from aquant_jax.errors import InputError, check_type
from aquant_jax.layers.compiler import Compiler
from aquant_jax.plan import augmentation, checks
from aquant_jax.plan.network import Network
from aquant_jax.plan.prepare import prepare
from aquant_jax.recipe import Recipe
from aquant_jax.reconstruction import devices, hosts
from aquant_jax.reconstruction.activation_cache import Cache
from aquant_jax.reconstruction.block_store import BlockResult
from aquant_jax.reconstruction.border_choice import resolved
from aquant_jax.reconstruction.finetune import finetune
from aquant_jax.reconstruction.finetune_checks import check_finetune, check_held_out
from aquant_jax.reconstruction.fingerprint import fingerprint
from aquant_jax.reconstruction.float_block import FloatBlock
from aquant_jax.reconstruction.memory import MemoryPlan, check_limit, plan_memory
from aquant_jax.reconstruction.observer import Observer, for_seeds
from aquant_jax.reconstruction.report import Report
from aquant_jax.reconstruction.run import Run, split
from aquant_jax.reconstruction.sequential import State, quantize_block

Stage = Callable[[Run, State], tuple[State, BlockResult]]


@jax.transfer_guard("allow")
def quantize(
    apply: Callable,
    variables: Any,
    calibration: Any,
    recipe: Recipe,
    *,
    mask: str | None = None,
    seed: int = 0,
    observer: Observer | None = None,
    compiler: Compiler | None = None,
    augment: augmentation.Augment | None = None,
    mesh: Mesh | None = None,
    memory_limit: int | None = None,
    resume: str | Path | None = None,
    restart_from: int | None = None,
) -> Quantized:
    """Quantize the network ``apply(variables, x)`` after training.

    >>> import numpy as np
    >>> import aquant_jax as aq
    >>> apply = lambda variables, x: x @ variables["kernel"]
    >>> variables = {"kernel": np.eye(4, 3, dtype=np.float32)}
    >>> samples = np.linspace(-1, 1, 256, dtype=np.float32).reshape(64, 4)
    >>> network = aq.quantize(apply, variables, samples, aq.recipes.nearest(8, 8))
    >>> network(samples[:2]).shape
    (2, 3)

    Arrays move between host and device in it, whatever `jax.transfer_guard` is in force.

    Args:
      apply: any traceable inference function (Flax NNX after `nnx.split`, linen, plain JAX).
      variables: pytree of float32, bfloat16 or float16 arrays (others are passed through).
      calibration: unlabelled inputs, a pytree of arrays with a leading sample axis: float32,
        bfloat16, float16 or integers. A scalar, such as a decode index, belongs to every sample;
        ranges are searched for its value alone. On a mesh of several processes, a `jax.Array` that
        is split over them along the axis "data" is read where it lies, by no process as a whole.
      recipe: see `recipes`; the same recipe, seed and machine give the same codes, bit for bit.
      mask: path of the calibration leaf ``[samples, positions]`` that is one at the positions of a
        sequence and zero at its padding. Padding is excluded from losses and from the range search.
        Sequence axes are found by tracing the network again with sequences one shorter;
        activations without such an axis have no padding.
      seed: seeds batches and masks.
      observer: receives the progress. None shows a bar on a terminal and logs through absl
        elsewhere; ``aq.Observer()`` is silent.
      compiler: shares compiled steps between calls; ``Compiler(gpu_ops.backend())`` is faster.
      augment: ``augment(key, batch) -> batch`` makes random inputs of the same shapes from a batch
        of samples, for the whole-network stage; it needs no labels. None leaves them as they are.
      mesh: devices to split the samples over, such as ``jax.make_mesh((4,), ("data",))``: those of
        the calibration set, of its caches and of every batch. Any number of devices draws the same
        batches; sums are added up in another order, so that codes may differ. Weights and optimizer
        state are on every device, or split over a second axis "model" along the output channels.
        The result is on the default device, as without a mesh. The devices may be those of all
        processes of `jax.distributed`, each of which makes the same call, with a folder `resume`
        that all see; the first one writes, and shows the progress.
      memory_limit: bytes that the device may have in use, or the process on a CPU; None takes what
        is free. Cached activations that do not fit lie on the host, or in files in `resume` or the
        folder of temporary files, with the same bits. The estimate is printed; no hard limit.
      resume: folder of a block store. Every finished block is kept there, and the same call resumes
        after the last one, with bit-identical results.
      restart_from: with `resume`, the first block to learn again; the recipe may then differ from
        the previous one in ``recipe.reconstruction``, and `augment` from the previous one.

    Returns:
      The quantized network.

    Raises:
      InputError: whatever `prepare` refuses; a seed that is no whole number of 0 or more; samples,
        outputs or an `augment` that the whole-network stage cannot use; a mesh with other axes, or
        whose devices do not divide a batch; processes that make different calls, or an InputError
        of one of them, which all raise; too little memory or disk for a block; a block store
        that cannot be written, is damaged, or is of another call (what differs is listed).
      ReconstructionError: a block's loss, or a layer's float input, is not finite.
    """
    observers = None if observer is None else (observer,)
    compiler = compiler or Compiler()
    shared = _Shared(
        apply, variables, calibration, recipe, mask, compiler, augment, mesh, memory_limit
    )
    folders = {checks.check_count("seed", seed): checks.check_resume(resume)}
    return _quantize(shared, folders, observers, restart_from)[0]


@jax.transfer_guard("allow")
def quantize_seeds(
    apply: Callable,
    variables: Any,
    calibration: Any,
    recipe: Recipe,
    seeds: Sequence[int],
    *,
    mask: str | None = None,
    observers: Sequence[Observer] | None = None,
    compiler: Compiler | None = None,
    augment: augmentation.Augment | None = None,
    mesh: Mesh | None = None,
    memory_limit: int | None = None,
    resume: str | Path | None = None,
    restart_from: int | None = None,
) -> list[Quantized]:
    """Quantize a network once for each of several seeds; the bits are those of `quantize`.

    The seeds take turns at every block, so that they share all that does not depend on a seed: the
    activations of the float network, the searched ranges and the compiled functions.

    >>> import numpy as np
    >>> import aquant_jax as aq
    >>> variables = {"kernel": np.eye(4, 3, dtype=np.float32)}
    >>> samples = np.linspace(-1, 1, 256, dtype=np.float32).reshape(64, 4)
    >>> apply, recipe = lambda variables, x: x @ variables["kernel"], aq.recipes.nearest(8, 8)
    >>> len(aq.quantize_seeds(apply, variables, samples, recipe, seeds=(0, 1, 2)))
    3

    Args:
      apply, variables, calibration, recipe, mask: see `quantize`.
      compiler, augment, mesh, memory_limit, restart_from: see `quantize`.
      seeds: different whole numbers of 0 or more.
      observers: one for each seed. None takes the default for the first seed only.
      resume: folder with a block store for each seed, ``seed-N``, which is one of `quantize` too.

    Returns:
      The quantized networks, in the order of the seeds.

    Raises:
      InputError: see `quantize`; no seed, one twice, or another number of observers.
      ReconstructionError: see `quantize`.
    """
    if not np.iterable(seeds):
        raise InputError(f"seeds is {seeds!r}; it must be a list, such as (0, 1, 2)")
    numbers = [checks.check_count("seed", seed) for seed in seeds]
    if not numbers or len(set(numbers)) < len(numbers):
        raise InputError(f"seeds are {list(seeds)}; they must be different, and one or more")
    compiler = compiler or Compiler()
    shared = _Shared(
        apply, variables, calibration, recipe, mask, compiler, augment, mesh, memory_limit
    )
    parent = checks.check_resume(resume)
    folders = {n: parent and parent / f"seed-{n}" for n in numbers}
    return _quantize(shared, folders, observers, restart_from)


class _Shared(NamedTuple):
    """The arguments of a call that are the same for all seeds."""

    apply: Callable
    variables: Any
    calibration: Any
    recipe: Recipe
    mask: str | None
    compiler: Compiler
    augment: augmentation.Augment | None
    mesh: Mesh | None
    memory_limit: int | None


def _quantize(
    shared: _Shared,
    folders: Mapping[int, Path | None],
    observers: Sequence[Observer] | None,
    restart_from: int | None,
) -> list[Quantized]:
    """One network for every seed; `folders` has its block store."""
    checks.check_recipe(shared.recipe)
    check_type("compiler", shared.compiler, Compiler, "an aq.Compiler")
    observers = for_seeds(observers, len(folders))
    if restart_from is not None:
        restart_from = checks.check_count("restart_from", restart_from)
    devices.check_mesh(shared.mesh)
    check_limit(shared.memory_limit)
    several = shared.mesh is not None and shared.mesh.is_multi_process
    calibration, net = hosts.together(functools.partial(_accepted, shared), several)

    @functools.cache  # it reads all arrays
    def call(seed: int) -> dict[str, Any]:
        return fingerprint(net, calibration, seed, shared.compiler, shared.augment)

    if several:
        resume = any(folder is not None for folder in folders.values())
        same = {"seed": list(folders), "resume": resume, "restart_from": restart_from}
        hosts.check_same(call(next(iter(folders))) | same)
    with contextlib.ExitStack() as stack:
        stack.enter_context(devices.in_force(shared.mesh))
        folder = next(iter(folders.values()))
        memory = plan_memory(net, shared.memory_limit, folder, len(folders))
        runs = _runs(net, calibration, shared, memory, zip(folders, observers, strict=True))
        for i, (seed, folder) in enumerate(folders.items()):
            opened = hosts.open_blocks(folder, restart_from, functools.partial(call, seed))
            store = stack.enter_context(opened)
            runs[i] = runs[i]._replace(block_store=store)
        for observer in observers:
            observer.on_start(net)
            observer.on_memory(memory)
            stack.callback(observer.on_end)
        networks = _all_stages(runs, calibration)
    return networks if shared.mesh is None else list(map(devices.unplaced, networks))


def _accepted(shared: _Shared) -> tuple[Any, Network]:
    """The calibration set and the prepared network of arguments that are in order."""
    given = devices.shared(shared.calibration, shared.mesh, shared.recipe, shared.mask)
    calibration = checks.host_arrays(given)
    variables = devices.whole(shared.variables, shared.mesh)
    net = prepare(shared.apply, variables, calibration, shared.recipe, shared.mask)
    devices.check_batch(shared.mesh, net.batch)
    return calibration, net


def _runs(
    net: Network,
    calibration: Any,
    shared: _Shared,
    memory: MemoryPlan,
    seeds: Iterable[tuple[int, Observer]],
) -> list[Run]:
    """The fixed part of every seed, checked, on the devices of the mesh in force."""
    compiler, augment = shared.compiler, shared.augment
    leaves = jax.tree.leaves(calibration)
    leaves = map(devices.split_samples if memory.inputs_on_device else devices.on_hosts, leaves)
    inputs = dict(zip(net.graph.inputs, leaves, strict=True))
    net = net if shared.mesh is None else devices.on_host(net)
    on_leaves = augmentation.on_leaves(augment, calibration, net) if augment else None
    everyone = np.arange(net.samples)
    runs = [
        Run(net, inputs, seed, compiler, observer, memory, everyone, augment=on_leaves)
        for seed, observer in seeds
    ]
    if net.recipe.reconstruction.whole_network_steps:
        check_finetune(runs[0])
    elif net.recipe.border == AUTO:
        check_held_out(runs[0])
    else:
        return runs
    return [run._replace(learn_from=split(run)[0]) for run in runs]


def _all_stages(runs: Sequence[Run], calibration: Any) -> list[Quantized]:
    """Every block, and then the whole-network stage, one seed after another."""
    net = runs[0].net
    states = [State() for _ in runs]
    reports: list[list[Report]] = [[] for _ in runs]

    def advance(stage: Stage) -> None:
        for i, run in enumerate(runs):
            states[i], result = stage(run, states[i])
            reports[i].append(result.report)
            run.observer.on_block_end(result.report)

    boundary: tuple[Cache, ...] = ()
    for block in net.blocks:
        floating = FloatBlock(runs[0], block, boundary, states[0].activations.keys())
        advance(functools.partial(quantize_block, floating=floating))
        if block is not net.blocks[-1]:
            boundary = floating.end
    if net.recipe.reconstruction.whole_network_steps:
        advance(finetune)
    networks = []
    for state, reported in zip(states, reports, strict=True):
        built = resolved(net, state.borders)
        networks.append(assemble(calibration, built, state.layers, state.activations, reported))
    return networks
