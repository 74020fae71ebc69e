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
            self._functions[key] = jax.jit(build(), **options)
        return self._functions[key]
