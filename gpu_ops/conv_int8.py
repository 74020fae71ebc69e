"""A deployed convolution in one call, from values or codes to values and codes."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.border import Coefficients
from aquant_jax.arithmetic.uniform import NEAREST, ActivationQuantizer
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.conv_geometry import ConvGeometry
from aquant_jax.layers.epilogue import Codes, Epilogue, Requantization, Results
from aquant_jax.layers.integer import QuantizedWeights
from gpu_ops import (
    _cpu,  # pyright: ignore[reportMissingModuleSource]
    arguments,
    partition,
    targets,
)

IMAGES, PIXELS, POOLED = "n h w c", "n a b o", "n v y o"
# Tensors of codes that a GPU writes in one call.
MOST_TENSORS = 8


class ConvInt8Call(NamedTuple):
    """A call of the handler `conv_int8`, over two spatial axes.

    Its operands are: the activation, uint8 codes or values; the residual, likewise, or empty; step
    size and zero point of the activation; its coefficients ``[degree + 1, taps, C]``; weight codes,
    their zero points and scales; the bias, or empty; step size and zero point of the residual, and
    of every tensor of codes that results, ``[T, 2]``; quadratic coefficients of these,
    ``[T, 3, O]``.

    Attributes:
      geometry: of the convolution.
      rounding: of the activation.
      weight_bits: of the weight codes.
      added: whether there is a residual.
      low, high: what the result is clipped to.
      values: whether float32 results are wanted, before any codes.
      code_bits, code_phis: of the tensors of codes that result.
      pool: windows whose maximum is the result; None for none.
    """

    geometry: ConvGeometry
    rounding: Rounding
    weight_bits: int
    added: bool = False
    low: float = -math.inf
    high: float = math.inf
    values: bool = True
    code_bits: tuple[int, ...] = ()
    code_phis: tuple[int, ...] = ()
    pool: ConvGeometry | None = None

    @property
    def images(self) -> int:
        """The activation and the residual, for one result."""
        return 2 if self.values + len(self.code_bits) == 1 else 0

    @property
    def operands(self) -> str:
        residual = PIXELS if self.added else "z"
        return f"{IMAGES}, {residual}, , , d t e, i j k o, o, o, p, q, r s, r u o"

    @property
    def results(self) -> str:
        each = PIXELS if self.pool is None else POOLED
        return ", ".join([each] * (self.values + len(self.code_bits)))

    def __call__(self, x: AnyArray, residual: AnyArray, *others: AnyArray) -> Any:
        outputs = others[3].shape[-1]
        shape = (x.shape[0], *(self.pool or self.geometry).out, outputs)
        dtypes = [jnp.float32] * self.values + [jnp.uint8] * len(self.code_bits)
        results = [jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes]
        attributes = targets.geometry_attributes(self.geometry)
        attributes |= targets.rounding_attributes(self.rounding)
        own = (name for name in self._fields[2:] if name not in ("added", "pool"))
        attributes |= {name: getattr(self, name) for name in own}
        attributes |= {"per_channel": self.rounding.per_channel, "pool": _pool_sizes(self.pool)}
        step, zero, coefficients, codes, zeros, scale, bias, *grids = others
        operands = (x, step, zero, coefficients, codes, zeros, scale, bias, residual, *grids)
        found = targets.call("conv_int8", results, **attributes)(*operands)
        return found[0] if len(found) == 1 else tuple(found)


def serves(
    x: AnyArray | Codes, rounding: Rounding, geometry: ConvGeometry, epilogue: Epilogue
) -> bool:
    """Whether the default device runs a convolution by this call: a CPU any, a GPU where an
    activation has one code, whatever tap reads it."""
    if jax.default_backend() == "cpu":
        return True
    columns = rounding.border is not None and not rounding.per_channel and geometry.gathers
    return (isinstance(x, Codes) or not columns) and len(epilogue.requantizations) <= MOST_TENSORS


def conv_int8(
    x: AnyArray | Codes,
    quantizer: ActivationQuantizer,
    coefficients: Coefficients,
    weights: QuantizedWeights,
    rounding: Rounding,
    geometry: ConvGeometry,
    epilogue: Epilogue,
) -> Results:
    """`conv_border_int8` of checked operands that this call `serves`."""
    if jax.default_backend() == "cpu":
        _say_if_slow(_cpu.instructions())
    taps = 1 if rounding.per_channel else geometry.taps
    channels, outputs = geometry.groups * weights.codes.shape[2], weights.codes.shape[3]
    if isinstance(x, Codes):
        x, coefficients, rounding = x.codes, {}, Rounding(rounding.bits)
    step, zero = arguments.check_quantizer(quantizer, rounding.bits)
    residual, grid = _residual(epilogue)
    wanted = epilogue.requantizations
    call = ConvInt8Call(
        geometry, rounding, weights.bits, epilogue.residual is not None,
        float(epilogue.low), float(epilogue.high), epilogue.values,
        tuple(r.rounding.bits for r in wanted),
        tuple(targets.PHIS[r.rounding.phi] for r in wanted), epilogue.pool,
    )  # fmt: skip
    results = partition.compiled(call)(
        x, residual, step, zero,
        arguments.stack_coefficients(coefficients, rounding.border, (taps, channels)),
        weights.codes, weights.zero_point, step * weights.scale,
        _or_empty(epilogue.bias), grid,
        jnp.stack([_grid(r.quantizer) for r in wanted]) if wanted else jnp.zeros((0, 2)),
        _quadratic(wanted, outputs),
    )  # fmt: skip
    results = results if isinstance(results, tuple) else (results,)
    values = epilogue.values
    return Results(results[0] if values else None, tuple(results[1:] if values else results))


@functools.cache
def _say_if_slow(instructions: str | None) -> None:
    """Logs, once, that the kernels run without VNNI."""
    if instructions in ("avx2", "plain"):
        logging.warning(
            "gpu_ops: no AVX-512 VNNI or AVX-VNNI here, so int8 convolutions run in their %s "
            "kernels: the results are the same, but take longer.",
            {"avx2": "AVX2", "plain": "plain C++"}[instructions],
        )


def _residual(epilogue: Epilogue) -> tuple[AnyArray, jax.Array]:
    """The residual and its grid; both are empty where there is none."""
    residual = epilogue.residual
    if isinstance(residual, Codes):
        return residual.codes, _grid(residual.quantizer)
    if residual is None:
        return jnp.zeros((0,)), jnp.zeros((0,))
    return residual.astype(jnp.float32), jnp.zeros((0,))


def _pool_sizes(pool: ConvGeometry | None) -> tuple[int, ...]:
    """Its attribute: kernel, strides, dilation and padding."""
    if pool is None:
        return ()
    padding = itertools.chain(*pool.padding)
    return (*pool.kernel, *pool.strides, *pool.dilation, *padding)


def _grid(quantizer: ActivationQuantizer) -> jax.Array:
    return jnp.stack([jnp.asarray(value, jnp.float32) for value in quantizer])


def _or_empty(value: AnyArray | None) -> AnyArray:
    return jnp.zeros((0,)) if value is None else value.astype(jnp.float32)


def _quadratic(wanted: tuple[Requantization, ...], outputs: int) -> jax.Array:
    """The borders of the results as quadratic ones, ``[T, 3, O]``; absent powers are zero."""
    rows = []
    for _, rounding, coefficients in wanted:
        if rounding.border is None:
            own = jnp.full((1, outputs), NEAREST, jnp.float32)
        else:
            own = arguments.stack_coefficients(coefficients, rounding.border, (1, outputs))[:, 0]
        rows.append(jnp.pad(own, ((0, 3 - own.shape[0]), (0, 0))))
    return jnp.stack(rows) if rows else jnp.zeros((0, 3, outputs))
