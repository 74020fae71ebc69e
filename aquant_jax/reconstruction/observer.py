"""Progress of a quantization: one protocol, for terminals, logs and callbacks."""

from __future__ import annotations

import sys

from absl import logging
from tqdm import tqdm

from aquant_jax.graph.partition import Block
from aquant_jax.plan.network import Network, describe
from aquant_jax.reconstruction.report import BlockReport


class Observer:
    """Receives the progress of `quantize`. Override the methods of interest; the base is silent."""

    def on_start(self, net: Network) -> None:
        """The input was accepted; the first block follows."""

    def on_block_start(self, index: int, block: Block) -> None:
        """A block is about to be reconstructed. Not called for a block read from a block store."""

    def on_step(self, index: int, step: int, loss: float) -> None:
        """`step` steps of a block are done; `loss` is the mean since the call before."""

    def on_block_end(self, report: BlockReport) -> None:
        """A block is finished, or was read from a block store."""

    def on_end(self) -> None:
        """All blocks are finished, or an exception ends the run."""


class TerminalObserver(Observer):
    """Prints the blocks and shows a progress bar on standard error."""

    def on_start(self, net: Network) -> None:
        print(describe(net))
        self._steps, self._blocks = net.recipe.reconstruction.steps, len(net.blocks)
        total = self._steps * self._blocks
        self._bar = tqdm(total=total, disable=not total, unit="step")

    def on_block_start(self, index: int, block: Block) -> None:
        self._bar.set_description(f"block {index + 1}/{self._blocks} {block.name}")

    def on_step(self, index: int, step: int, loss: float) -> None:
        self._bar.update(index * self._steps + step - self._bar.n)
        self._bar.set_postfix(loss=f"{loss:.4g}")

    def on_block_end(self, report: BlockReport) -> None:
        self._bar.update((report.index + 1) * self._steps - self._bar.n)
        if report.fell_back_to_nearest:
            self._bar.write(f"{report.name}: {FELL_BACK}")

    def on_end(self) -> None:
        self._bar.close()


class LogObserver(Observer):
    """Logs through absl: the blocks, and one line per finished block."""

    def on_start(self, net: Network) -> None:
        logging.info("%s", describe(net))
        self._blocks = len(net.blocks)

    def on_block_end(self, report: BlockReport) -> None:
        logging.info(
            "block %d/%d %s: error %.4g, nearest %.4g, %.1f s",
            report.index + 1, self._blocks, report.name,
            report.final_error, report.start_error, report.seconds,
        )  # fmt: skip
        if report.fell_back_to_nearest:
            logging.warning("%s: %s", report.name, FELL_BACK)


class Observers(Observer):
    """Passes everything on to several observers."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def on_start(self, net: Network) -> None:
        for observer in self.observers:
            observer.on_start(net)

    def on_block_start(self, index: int, block: Block) -> None:
        for observer in self.observers:
            observer.on_block_start(index, block)

    def on_step(self, index: int, step: int, loss: float) -> None:
        for observer in self.observers:
            observer.on_step(index, step, loss)

    def on_block_end(self, report: BlockReport) -> None:
        for observer in self.observers:
            observer.on_block_end(report)

    def on_end(self) -> None:
        for observer in self.observers:
            observer.on_end()


FELL_BACK = "reconstruction did not reduce the error; using nearest rounding"


def default_observer() -> Observer:
    """A `TerminalObserver` where standard error is a terminal, else a `LogObserver`."""
    return TerminalObserver() if sys.stderr.isatty() else LogObserver()
