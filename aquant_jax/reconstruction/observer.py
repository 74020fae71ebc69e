"""Progress of a quantization: one protocol, for terminals, logs and callbacks."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import jax
from absl import logging
from tqdm import tqdm

from aquant_jax.errors import InputError, check_type
from aquant_jax.graph.partition import Block
from aquant_jax.plan.description import describe
from aquant_jax.plan.network import Network
from aquant_jax.reconstruction.memory import MemoryPlan
from aquant_jax.reconstruction.report import Report
from aquant_jax.terminal import show


class Observer:
    """Receives the progress of `quantize`. Override the methods of interest; the base is silent.

    The whole-network stage counts as one more block, whose report is a `FinetuneReport`.

    >>> import aquant_jax as aq
    >>> class Losses(aq.Observer):
    ...     def on_step(self, index, step, loss):
    ...         print(f"block {index}, step {step}: {loss}")
    >>> Losses().on_step(0, 20, 0.25)  # quantize(observer=Losses()) calls it
    block 0, step 20: 0.25
    """

    def on_start(self, net: Network) -> None:
        """The input was accepted; the first block follows."""

    def on_memory(self, plan: MemoryPlan) -> None:
        """What the blocks need, and where their caches lie; follows `on_start`."""

    def on_block_start(self, index: int, block: Block) -> None:
        """A block is about to be reconstructed. Not called for a block read from a block store."""

    def on_step(self, index: int, step: int, loss: float) -> None:
        """`step` steps of a block are done; `loss` is the mean since the call before."""

    def on_block_end(self, report: Report) -> None:
        """A block is finished, or was read from a block store."""

    def on_end(self) -> None:
        """All blocks are finished, or an exception ends the run."""


class TerminalObserver(Observer):
    """Prints the blocks and shows a progress bar on standard error.

    >>> import aquant_jax as aq
    >>> observer = aq.TerminalObserver()  # quantize(observer=observer)
    """

    def on_start(self, net: Network) -> None:
        show(describe(net))
        self._ends = list(itertools.accumulate(_steps(net)))
        self._bar = tqdm(total=self._ends[-1], disable=not self._ends[-1], unit="step")

    def on_memory(self, plan: MemoryPlan) -> None:
        print(plan)

    def on_block_start(self, index: int, block: Block) -> None:
        self._bar.set_description(f"block {index + 1}/{len(self._ends)} {block.name}")

    def on_step(self, index: int, step: int, loss: float) -> None:
        self._bar.update((self._ends[index - 1] if index else 0) + step - self._bar.n)
        self._bar.set_postfix(loss=f"{loss:.4g}")

    def on_block_end(self, report: Report) -> None:
        self._bar.update(self._ends[report.index] - self._bar.n)
        if report.warning:
            self._bar.write(f"{report.name}: {report.warning}")

    def on_end(self) -> None:
        self._bar.close()


class LogObserver(Observer):
    """Logs through absl: the blocks, and one line per finished block.

    >>> from absl import logging
    >>> import aquant_jax as aq
    >>> logging.set_verbosity(logging.INFO)  # absl shows warnings alone by default
    >>> observer = aq.LogObserver()  # quantize(observer=observer)
    >>> logging.set_verbosity(logging.WARNING)
    """

    def on_start(self, net: Network) -> None:
        logging.info("%s", describe(net))
        self._blocks = len(_steps(net))
        self._learned: set[int] = set()

    def on_memory(self, plan: MemoryPlan) -> None:
        logging.info("%s", plan)

    def on_block_start(self, index: int, block: Block) -> None:
        self._learned.add(index)

    def on_block_end(self, report: Report) -> None:
        how = f"learned in {report.seconds:.1f} s" if report.index in self._learned else "read"
        logging.info(
            "block %d/%d %s: %s, error %.4g, at the start %.4g",
            report.index + 1, self._blocks, report.name, how, report.final_error,
            report.start_error,
        )  # fmt: skip
        if report.warning:
            logging.warning("%s: %s", report.name, report.warning)


class Observers(Observer):
    """Passes everything on to several observers.

    >>> import aquant_jax as aq
    >>> len(aq.Observers(aq.LogObserver(), aq.Observer()).observers)
    2
    """

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def on_start(self, net: Network) -> None:
        for observer in self.observers:
            observer.on_start(net)

    def on_memory(self, plan: MemoryPlan) -> None:
        for observer in self.observers:
            observer.on_memory(plan)

    def on_block_start(self, index: int, block: Block) -> None:
        for observer in self.observers:
            observer.on_block_start(index, block)

    def on_step(self, index: int, step: int, loss: float) -> None:
        for observer in self.observers:
            observer.on_step(index, step, loss)

    def on_block_end(self, report: Report) -> None:
        for observer in self.observers:
            observer.on_block_end(report)

    def on_end(self) -> None:
        for observer in self.observers:
            observer.on_end()


def for_seeds(observers: Sequence[Observer] | None, seeds: int) -> Sequence[Observer]:
    """The observer of every seed: those given, else the default one for the first seed alone.

    Raises:
      InputError: their number is another one, or one is no `Observer`.
    """
    if observers is None:
        return [default_observer(), *(Observer() for _ in range(seeds - 1))]
    if len(observers) != seeds:
        raise InputError(f"{len(observers)} observers for {seeds} seeds")
    for observer in observers:
        check_type("observer", observer, Observer, "an Observer, such as aq.LogObserver()")
    return observers


def default_observer() -> Observer:
    """A `TerminalObserver` where standard error is a terminal, else a `LogObserver`.

    Of several processes of JAX, only the first has one.
    """
    if jax.process_index():
        return Observer()
    return TerminalObserver() if sys.stderr.isatty() else LogObserver()


def _steps(net: Network) -> list[int]:
    """The steps of every block, and of the whole-network stage if there is one."""
    learning = net.recipe.reconstruction
    finetune = learning.whole_network_steps
    return [learning.steps] * len(net.blocks) + ([finetune] if finetune else [])
