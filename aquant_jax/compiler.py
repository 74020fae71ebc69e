"""Compiled functions, shared by what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


class Compiler:
    """Jitted functions by what they compute, so that units of one shape share them."""

    def __init__(self):
        self._functions: dict[Any, Callable] = {}

    def get(self, key, build: Callable[[], Callable], **options) -> Callable:
        if key not in self._functions:
            self._functions[key] = jax.jit(build(), compiler_options=_compiler_options(), **options)
        return self._functions[key]


def _compiler_options() -> dict[str, bool] | None:
    """On CPU, run the ops one after another: ops side by side evict each other's activations from
    the cache, which doubles the time of a step with learned borders."""
    if jax.default_backend() != "cpu":
        return None
    return {"xla_cpu_enable_concurrency_optimized_scheduler": False}
