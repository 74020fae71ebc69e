"""A block in the float network: targets, searched ranges and the boundary of the next block."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence, Set

import jax
import numpy as np

from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.errors import ReconstructionError
from aquant_jax.graph.ir import Atom
from aquant_jax.graph.partition import Block
from aquant_jax.plan.block_program import BlockProgram, make_block_program
from aquant_jax.reconstruction.activation_cache import Cache, store
from aquant_jax.reconstruction.border_choice import (
    Borders,
    Candidate,
    block_program,
    candidates,
)
from aquant_jax.reconstruction.observe_ranges import observe_ranges
from aquant_jax.reconstruction.run import Run, all_batches, run_batches
from aquant_jax.reconstruction.weights import (
    WeightQuantizer,
    float_weights,
    make_weight_quantizers,
)


class FloatBlock:
    """A block in the float network: what all seeds share, computed when it is first read.

    Args:
      run: the fixed part, of any seed.
      block: of the network.
      boundary: activations at the block's boundary, from the float network.
      known: keys of the tensors that earlier blocks quantize.
    """

    def __init__(
        self, run: Run, block: Block, boundary: tuple[Cache, ...], known: Set[str]
    ) -> None:
        self.block, self.boundary, self._run, self._known = block, boundary, run, known
        net = run.net
        self.program = make_block_program(net.graph, net.plan, block.start, block.targets)
        # A block may pass on other values than those whose error it minimises.
        self.onward = self.program
        if block.end != block.targets:
            self.onward = make_block_program(net.graph, net.plan, block.start, block.end)

    @functools.cached_property
    def candidates(self) -> list[Candidate]:
        """The block with the borders to try, where the recipe has ``border="auto"``."""
        return candidates(self._run.net, self.block)

    def onward_with(self, borders: Borders) -> BlockProgram:
        """`onward`, with the borders that were chosen."""
        if not borders:
            return self.onward
        return block_program(self._run.net, borders, self.block.start, self.block.end)

    @functools.cached_property
    def targets(self) -> tuple[Cache, ...]:
        """The block's outputs for all calibration samples."""
        return self._run_to_end(self.program)

    @functools.cached_property
    def end(self) -> tuple[Cache, ...]:
        """What the block passes on: the boundary of the next one."""
        if self.onward is self.program:
            return self.targets
        return self._run_to_end(self.onward)

    @functools.cached_property
    def weights(self) -> tuple[WeightQuantizer, ...]:
        """The quantizers of the weights, with searched scales."""
        return make_weight_quantizers(
            self.program, self._run.net.folded, self._run.compiler.weight_ranges
        )

    @functools.cached_property
    def fresh(self) -> dict[str, ActivationQuantizer]:
        """The quantizers of the tensors first read in the block, with searched step sizes."""
        net = self._run.net
        count = min(net.recipe.reconstruction.init_samples, net.samples)
        batches = functools.partial(self._batches, samples=count)
        return observe_ranges(net, (self.program, self.onward), batches, self._known)

    def _run_to_end(self, program: BlockProgram) -> tuple[Cache, ...]:
        """Outputs of a program for all calibration samples."""
        samples, index = self._run.net.samples, self._run.net.blocks.index(self.block)
        batches = (outputs for _, outputs in self._batches(program, samples))
        check = functools.partial(self._check, program.subgraph.outputs)
        return store(batches, samples, self._run.memory.allocate(index), check)

    def _check(self, ids: Sequence[Atom], i: int, values: np.ndarray, position: int) -> None:
        """ReconstructionError where values hold NaN, or infinity that is no mask.

        A mask is minus infinity; an output of the network may have the other infinity too.
        """
        wrong = np.isnan(values)
        if ids[i] not in self._run.net.graph.outputs:
            wrong |= np.isposinf(values)
        if wrong.any():
            sample = position + int(np.argmax(wrong.reshape(len(values), -1).any(axis=1)))
            raise ReconstructionError(
                f"{self.block.name}: the float network itself computes NaN or infinity here, first "
                f"for calibration sample {sample % self._run.net.samples}, in "
                f"{values.dtype}{list(values.shape[1:])}"
            )

    def _batches(
        self, program: BlockProgram, samples: int
    ) -> Iterator[tuple[np.ndarray, Sequence[jax.Array]]]:
        weights = float_weights(program, self._run.net.folded)
        batches = all_batches(self._run.net)[: math.ceil(samples / self._run.net.batch)]
        return run_batches(self._run, program, weights, None, self.boundary, batches)
