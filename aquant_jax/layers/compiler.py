"""Compiled functions, shared by what they compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax

from aquant_jax.layers import im2col
from aquant_jax.layers.fake_quant import run_layer


class Backend(Protocol):
    """Operations that may be replaced by faster ones, such as ``gpu_ops.backend()``."""

    convolve: Callable[..., jax.Array]
    """Has the contract of `columns.convolve`."""


class Compiler:
    """Jitted functions by what they compute, so that units of one shape share them.

    Attributes:
      name: of the backend.
      layer: runs a layer, with the backend's convolution over columns.
    """

    def __init__(self, backend: Backend = im2col):
        kind = type(backend)
        self.name = getattr(backend, "__name__", f"{kind.__module__}.{kind.__qualname__}")
        self.layer = functools.partial(run_layer, convolve=backend.convolve)
        self._functions: dict[Any, Callable] = {}

    def get(self, key, build: Callable[[], Callable], **options) -> Callable:
        if key not in self._functions:
            self._functions[key] = jax.jit(build(), **options)
        return self._functions[key]
