"""Observers of a quantization for tests."""

from collections.abc import Callable

import aquant_jax as aq


class Recorder(aq.Observer):
    """Keeps the reports of the finished blocks, and the numbers of the blocks that were learned."""

    def __init__(self, on_block_end: Callable[[aq.BlockReport], None] = lambda report: None):
        self.reports: list[aq.BlockReport] = []
        self.learned: list[int] = []
        self._on_block_end = on_block_end

    def on_block_start(self, index, block):
        self.learned.append(index)

    def on_block_end(self, report):
        self.reports.append(report)
        self._on_block_end(report)
