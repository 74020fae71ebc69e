"""The compiled handlers, their registration with XLA, and their attributes.

A handler has one name on all platforms, so a program that was traced or exported for one platform
runs on another. The exceptions fail with a message: `border_conv` exists for the CPU only and
`conv_tuned` for NVIDIA GPUs only. On a GPU `conv_int8` takes one code an activation.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aquant_jax.layers.column import Rounding
from aquant_jax.layers.conv_geometry import ConvGeometry

try:
    from gpu_ops import _cpu  # pyright: ignore[reportMissingModuleSource]
except ImportError:
    if importlib.util.find_spec("gpu_ops._cpu") is not None:
        raise
    _folder = Path(__file__).parent
    raise ImportError(
        f"gpu_ops in {_folder} is not compiled for this Python: pip install -e {_folder.parent}",
        name="gpu_ops",
    ) from None
try:
    from gpu_ops import _cuda  # pyright: ignore[reportMissingModuleSource, reportAttributeAccessIssue]
except ImportError:
    _cuda = None

Attribute = tuple[int, ...] | int | float | bool

# The coefficients of the built-in borders, in the order of `border_math.h`.
COEFFICIENTS = {"constant": ("b0",), "linear": ("b0", "b1"), "quadratic": ("b0", "b1", "b2")}
PHIS = {"identity": 0, "clamp": 1, "clamp_ste": 2}
PREFIX = "gpu_ops_"
# Handlers count the elements of one image in int32.
MAX_INDEX = 2**31 - 1
# Platforms that have handlers, as `jax.default_backend` names them.
PLATFORMS = ("cpu",) if _cuda is None else ("cpu", "gpu")
# Handlers that only say why an operation is missing on CUDA.
MISSING = _cpu.missing()

for _name, _handler in _cpu.handlers().items():
    jax.ffi.register_ffi_target(_name, _handler, platform="cpu")
for _name, _handler in (MISSING | ({} if _cuda is None else _cuda.handlers())).items():
    jax.ffi.register_ffi_target(_name, _handler, platform="CUDA")


def geometry_attributes(geometry: ConvGeometry) -> dict[str, Attribute]:
    """The attributes that tell a handler the geometry, over two spatial axes."""
    return {
        "kernel": geometry.kernel,
        "stride": geometry.strides,
        "dilation": geometry.dilation,
        "padding": tuple(end for pair in geometry.padding for end in pair),
        "groups": geometry.groups,
    }


def rounding_attributes(rounding: Rounding) -> dict[str, Attribute]:
    """The attributes that tell a handler how to round; the coefficients tell it the border."""
    return {
        "bits": int(rounding.bits),
        "shared_across_taps": bool(rounding.shared_across_taps),
        "phi": PHIS[rounding.phi],
    }


def call(name: str, results: Any, **attributes: Attribute) -> Callable[..., Any]:
    """The custom call `name`, to be applied to its operands.

    Args:
      name: of the handler, without the prefix.
      results: `jax.ShapeDtypeStruct`, one or several.
      **attributes: of the handler.
    """
    target = jax.ffi.ffi_call(f"{PREFIX}{name}", results, vmap_method="sequential")
    converted = {key: _converted(value) for key, value in attributes.items()}
    return lambda *operands: target(*operands, **converted)


def _converted(value: Attribute) -> Any:
    if isinstance(value, bool):
        return np.bool_(value)
    return np.asarray(value, np.float32 if isinstance(value, float) else np.int64)[()]


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """The `disabled_checks` of `jax.export.export` for programs that contain these custom calls.

    A process that loads such a program must ``import gpu_ops`` before it runs it. Otherwise XLA
    raises an error that names the custom call; the name begins with ``gpu_ops_``.

    >>> import jax
    >>> import gpu_ops
    >>> checks = gpu_ops.export_checks()
    >>> jax.export.export(jax.jit(abs), disabled_checks=checks)  # doctest: +ELLIPSIS
    <function ...>
    """
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in _cpu.handlers()]
