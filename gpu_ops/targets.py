"""The compiled handlers: which there are, and their registration with XLA.

A handler has one name on all platforms, so a program that was traced or exported for one runs on
another; but for `border_conv`, which is the CPU's alone and says so on a GPU.
"""

from __future__ import annotations

import jax
import numpy as np

from gpu_ops import _cpu  # pyright: ignore[reportMissingModuleSource]

try:
    from gpu_ops import _cuda  # pyright: ignore[reportMissingModuleSource, reportAttributeAccessIssue]
except ImportError:
    _cuda = None

# The coefficients of the built-in borders, in the order of `border_math.h`.
COEFFICIENTS = {"constant": ("b0",), "linear": ("b0", "b1"), "quadratic": ("b0", "b1", "b2")}
PHIS = {"identity": 0, "clamp": 1, "clamp_ste": 2}
PREFIX = "gpu_ops_"
# What a handler counts with inside one image.
MAX_INDEX = 2**31 - 1
# Platforms, as `jax.default_backend` names them, with handlers of their own.
PLATFORMS = ("cpu",) if _cuda is None else ("cpu", "gpu")

for _name, _handler in _cpu.handlers().items():
    jax.ffi.register_ffi_target(_name, _handler, platform="cpu")
for _name, _handler in (_cpu.missing() | ({} if _cuda is None else _cuda.handlers())).items():
    jax.ffi.register_ffi_target(_name, _handler, platform="CUDA")


def call(name: str, results, **attributes):
    """The custom call `name`, to be applied to its operands.

    Args:
      name: of the handler, without the prefix.
      results: `jax.ShapeDtypeStruct`, one or several.
      **attributes: tuples of integers, integers and booleans.
    """
    target = jax.ffi.ffi_call(f"{PREFIX}{name}", results, vmap_method="sequential")
    converted = {key: _attribute(value) for key, value in attributes.items()}
    return lambda *operands: target(*operands, **converted)


def _attribute(value):
    return np.bool_(value) if isinstance(value, bool) else np.asarray(value, np.int64)[()]


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export.export` must be told to let these custom calls pass.

    A process that loads such a program needs ``import gpu_ops`` before it runs it; without, XLA's
    error names the custom call, whose name begins with ``gpu_ops_``.

    >>> jax.export.export(jax.jit(abs), disabled_checks=export_checks())  # doctest: +ELLIPSIS
    <function ...>
    """
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in _cpu.handlers()]
