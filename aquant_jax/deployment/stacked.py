"""A deployed network whose stacked layers run in a loop, so that its program does not grow with
their number.

A trace unrolls a loop over stacked weights, because each layer is quantized on its own. Here its
steps become a loop again where they compute the same function of states of their own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax import lax

from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.deployment.states import read_stacked
from aquant_jax.graph.ir import Graph
from aquant_jax.graph.partition import crossing_values
from aquant_jax.graph.subgraph import BlockInputs
from aquant_jax.layers.fake_quant import LayerState
from aquant_jax.plan.assign import Plan
from aquant_jax.plan.block_program import BlockProgram, make_block_program

FEWEST_STEPS = 4  # of a loop; fewer run one after another, and codes pass between them


class State(NamedTuple):
    """What is deployed of a part of a network (a pytree).

    Attributes:
      layers: one per weighted op.
      activations: one per quantized tensor.
      constants: the slices of stacked weights that it reads as they are.
    """

    layers: list[LayerState]
    activations: list[ActivationQuantizer]
    constants: list[Any]


class Part(NamedTuple):
    """A part of a network.

    Attributes:
      programs: of the steps of a loop, which differ in their states only; or a single one.
      finished: outputs of the network that a single program gives, behind the inputs of the next
        part.
    """

    programs: tuple[BlockProgram, ...]
    finished: tuple[int, ...] = ()


def split(graph: Graph, plan: Plan, rolled: bool) -> list[Part]:
    """The parts of a folded network, in the order in which they run.

    Args:
      graph: the network.
      plan: its quantized layers and activations.
      rolled: whether stacked layers run in a loop; otherwise there is one part.
    """
    crossing = crossing_values(graph)
    made = {out: index for index, op in enumerate(graph.ops) for out in op.outputs}
    outputs = tuple(dict.fromkeys(out for out in graph.outputs if isinstance(out, int)))
    found: list[Part] = []
    begin, done = -1, set()

    def single(begin: int, end: int) -> Part:
        last = end == len(graph.ops) - 1
        finished = tuple(o for o in outputs if o not in done and (last or made.get(o, end) <= end))
        done.update(finished)
        start, stop = crossing[begin] if begin >= 0 else (), crossing[end]
        return Part((make_block_program(graph, plan, start, (*stop, *finished)),), finished)

    loops = _loops(graph, plan, crossing) if rolled else []
    for low, high, programs in loops:
        if low > begin:
            found.append(single(begin, low))
        found.append(Part(programs))
        begin = high
    return [*found, single(begin, len(graph.ops) - 1)]


def run(
    network: Sequence[Part],
    graph: Graph,
    values: Mapping[int, Any],
    states: Sequence[Mapping[str, Any]],
    run_program: Callable[[BlockProgram, State, BlockInputs], Sequence[Any]],
) -> list[Any]:
    """The outputs of a network.

    Args:
      network: its parts.
      graph: the network.
      values: of the leaves of its input and of its constants, by id.
      states: what is deployed of the network, by path: layers, activations and constants.
      run_program: runs a program.
    """
    boundary: tuple[Any, ...] = ()
    outputs: dict[int, Any] = {}
    for part in network:
        program = part.programs[0]

        def step(
            carry: tuple[Any, ...], state: State, program: BlockProgram = program
        ) -> tuple[tuple[Any, ...], None]:
            own = dict(zip(_slices(graph, program), state.constants, strict=True))
            model, constants = program.subgraph.model_inputs, program.subgraph.constants
            inputs = BlockInputs(
                carry,
                [values[i] for i in model],
                [own[i] if i in own else values[i] for i in constants],
            )
            return tuple(run_program(program, state, inputs)), None

        loop = len(part.programs) > 1
        state = State(
            *(
                [read_stacked(kind, paths) if loop else kind[paths[0]] for paths in each]
                for kind, each in zip(states, _paths(graph, part), strict=True)
            )
        )
        results, _ = lax.scan(step, boundary, state) if loop else step(boundary, state)
        count = len(results) - len(part.finished)
        boundary = results[:count]
        outputs.update(zip(part.finished, results[count:], strict=True))
    return [outputs[out] if isinstance(out, int) else out.val for out in graph.outputs]


def stacks(graph: Graph, plan: Plan) -> list[list[tuple[str, ...]]]:
    """The paths of the layers, activations and constants that the loops of a network stack."""
    found = _loops(graph, plan, crossing_values(graph))
    loops = [_paths(graph, Part(programs)) for *_, programs in found]
    return [[paths for loop in loops for paths in loop[kind]] for kind in range(len(State._fields))]


def _paths(graph: Graph, part: Part) -> list[list[tuple[str, ...]]]:
    """The paths of the layers, activations and constants of a part: those of every step."""
    steps = [
        (
            [spec.path for spec in program.specs],
            [tensor.key for tensor in program.tensors],
            [graph.slices[i].path for i in _slices(graph, program)],
        )
        for program in part.programs
    ]
    return [list(zip(*kinds, strict=True)) for kinds in zip(*steps, strict=True)]


def _slices(graph: Graph, program: BlockProgram) -> list[int]:
    return [i for i in program.subgraph.constants if i in graph.slices]


def _loops(
    graph: Graph, plan: Plan, crossing: Sequence[tuple[int, ...]]
) -> list[tuple[int, int, tuple[BlockProgram, ...]]]:
    """The loops: the ops before the first step and the last of the last one, and the steps."""
    outputs = {out for out in graph.outputs if isinstance(out, int)}
    found = []
    for bounds in _steps(graph):
        programs = [
            (low, high, make_block_program(graph, plan, crossing[low], crossing[high]))
            for low, high in itertools.pairwise(bounds)
            if low >= 0 and outputs.isdisjoint(_made(graph, low, high))
        ]
        for _, group in itertools.groupby(programs, lambda step: _function(graph, step[2])):
            steps = list(group)
            if len(steps) >= FEWEST_STEPS and _repeats(steps[0][2]):
                found.append((steps[0][0], steps[-1][1], tuple(step[2] for step in steps)))
    return found


def _steps(graph: Graph) -> list[list[int]]:
    """The bounds of the steps of every unrolled loop: the op before the first, the last of each."""
    ends: dict[str, dict[str, int]] = {}
    first: dict[str, int] = {}
    for index, op in enumerate(graph.ops):
        match = re.match(r"(\d+)\[(\d+)\]", op.iteration)
        if match and op.loop is None and graph.dynamic.intersection(op.outputs):
            number, step = match.groups()
            first.setdefault(number, index - 1)
            ends.setdefault(number, {})[step] = index
    return [[first[number], *steps.values()] for number, steps in ends.items()]


def _made(graph: Graph, low: int, high: int) -> set[int]:
    """The values that the ops after `low` make, up to `high`."""
    return {out for op in graph.ops[low + 1 : high + 1] for out in op.outputs}


def _function(graph: Graph, program: BlockProgram) -> tuple[Any, ...]:
    """What is equal for steps that compute the same function, but for their states."""
    subgraph = program.subgraph
    shared = tuple(i for i in subgraph.constants if i not in graph.slices)
    return program.key, subgraph.model_inputs, shared


def _repeats(program: BlockProgram) -> bool:
    """Whether what it gives is of the shapes that it takes."""
    avals, subgraph = program.avals, program.subgraph
    given = [avals[out].shape for out in subgraph.outputs if isinstance(out, int)]
    return given == [avals[value].shape for value in subgraph.boundary_inputs]
