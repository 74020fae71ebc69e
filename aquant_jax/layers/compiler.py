"""What calls share: compiled functions, and the scales of weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax

from aquant_jax.errors import check_type
from aquant_jax.layers.backend import Backend, ReferenceBackend
from aquant_jax.layers.fake_quant import run_layer


class Compiler:
    """A cache of jitted functions, so that blocks of the same shape share one compilation.

    Calls that share it also share the scales of weights, which are searched once for all of them.

    >>> import aquant_jax as aq
    >>> compiler = aq.Compiler()  # aq.quantize(..., compiler=compiler), as often as you like
    >>> compiler.backend.name
    'reference'

    Attributes:
      backend: runs convolutions over columns.
      layer: runs one layer, with the backend's convolution.
      weight_ranges: scales and zero points that were searched, by a digest of the weights.
    """

    def __init__(self, backend: Backend = ReferenceBackend()) -> None:  # noqa: B008 - immutable
        check_type("backend", backend, Backend, "an aq.Backend, such as gpu_ops.backend()")
        self.backend = backend
        self.layer = functools.partial(run_layer, convolve=backend.convolve)
        self.weight_ranges: dict[Hashable, Any] = {}
        self._functions: dict[Hashable, Callable] = {}

    def get(self, key: Hashable, build: Callable[[], Callable], **options: Any) -> Callable:
        """The function jitted under `key`; `build` makes it the first time.

        Args:
          key: equal for functions that compute the same result.
          build: returns the function to jit.
          **options: keyword arguments of `jax.jit`.
        """
        if key not in self._functions:
            self._functions[key] = jax.jit(build(), **options)
        return self._functions[key]
