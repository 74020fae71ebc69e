"""Large networks for the cost model of docs/scaling.md: plain JAX functions, traced and never run.

Each comes as ``(apply, variables, x)``, where `variables` and `x` are shapes alone.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Shapes = Any  # nested dicts of ShapeDtypeStruct
Abstract = tuple[Callable[[Any, Any], Any], Shapes, Any]


class VisionTransformer(NamedTuple):
    """Sizes of a vision transformer; the defaults are those of ViT-L/16 (Dosovitskiy et al. 2021,
    Table 1), at 224 pixels and 1,000 classes."""

    layers: int = 24
    width: int = 1024
    hidden: int = 4096
    heads: int = 16
    patch: int = 16
    image: int = 224
    classes: int = 1000


class Decoder(NamedTuple):
    """Sizes of a decoder; the defaults are those of Llama 3 8B (Dubey et al. 2024, Table 3)."""

    layers: int = 32
    width: int = 4096
    hidden: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256
    positions: int = 2048


def vision_transformer(sizes: VisionTransformer, samples: int) -> Abstract:
    """A vision transformer with pre-normalisation, GELU and a class token."""
    width, tokens = sizes.width, (sizes.image // sizes.patch) ** 2 + 1

    def layer(v: Any, x: jax.Array) -> jax.Array:
        h = _layer_norm(v["norm1"], x)
        q, k, y = (_heads(_dense(v[name], h), sizes.heads) for name in ("query", "key", "value"))
        x = x + _dense(v["out"], _attention(q, k, y, None))
        h = jax.nn.gelu(_dense(v["up"], _layer_norm(v["norm2"], x)))
        return x + _dense(v["down"], h)

    def apply(v: Any, images: jax.Array) -> jax.Array:
        stride = (sizes.patch, sizes.patch)
        x = jax.lax.conv_general_dilated(
            images, v["patches"]["kernel"], stride, "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        x = x.reshape(x.shape[0], -1, width) + v["patches"]["bias"]
        token = jnp.broadcast_to(v["token"], (x.shape[0], 1, width))
        x = jnp.concatenate([token, x], 1) + v["positions"]
        for index in range(sizes.layers):
            x = layer(v[f"layer_{index}"], x)
        return _dense(v["head"], _layer_norm(v["norm"], x)[:, 0])

    norm = {"scale": _shape(width), "bias": _shape(width)}
    own = {name: _dense_shapes(width, width) for name in ("query", "key", "value", "out")}
    own |= {"up": _dense_shapes(width, sizes.hidden), "down": _dense_shapes(sizes.hidden, width)}
    variables = {f"layer_{i}": {**own, "norm1": norm, "norm2": norm} for i in range(sizes.layers)}
    variables |= {
        "patches": {"kernel": _shape(*(sizes.patch,) * 2, 3, width), "bias": _shape(width)},
        "token": _shape(1, 1, width), "positions": _shape(1, tokens, width), "norm": norm,
        "head": _dense_shapes(width, sizes.classes),
    }  # fmt: skip
    return apply, variables, _shape(samples, sizes.image, sizes.image, 3)


def decoder(sizes: Decoder, samples: int) -> Abstract:
    """A causal decoder with RMS norms, rotary positions, grouped queries and SwiGLU."""
    size = sizes.width // sizes.heads
    table = _rotary(sizes.positions, size)
    allowed = np.tril(np.ones((sizes.positions, sizes.positions), bool))

    def layer(v: Any, x: jax.Array) -> jax.Array:
        h = _rms_norm(v["norm1"], x)
        q = _rotate(_heads(h @ v["query"]["kernel"], sizes.heads), table)
        k = _rotate(_heads(h @ v["key"]["kernel"], sizes.kv_heads), table)
        y = _heads(h @ v["value"]["kernel"], sizes.kv_heads)
        k, y = (jnp.repeat(part, sizes.heads // sizes.kv_heads, 2) for part in (k, y))
        x = x + _attention(q, k, y, allowed) @ v["out"]["kernel"]
        h = _rms_norm(v["norm2"], x)
        gate = jax.nn.silu(h @ v["gate"]["kernel"])
        return x + (gate * (h @ v["up"]["kernel"])) @ v["down"]["kernel"]

    def apply(v: Any, tokens: jax.Array) -> jax.Array:
        x = v["embedding"][tokens]
        for index in range(sizes.layers):
            x = layer(v[f"layer_{index}"], x)
        return _rms_norm(v["norm"], x) @ v["head"]["kernel"]

    width, hidden, narrow = sizes.width, sizes.hidden, sizes.kv_heads * size
    own = {
        name: {"kernel": _shape(*shape)}
        for name, shape in (
            ("query", (width, width)), ("key", (width, narrow)), ("value", (width, narrow)),
            ("out", (width, width)), ("gate", (width, hidden)), ("up", (width, hidden)),
            ("down", (hidden, width)),
        )
    }  # fmt: skip
    own |= {"norm1": _shape(width), "norm2": _shape(width)}
    variables: Shapes = {f"layer_{index}": own for index in range(sizes.layers)}
    variables |= {
        "embedding": _shape(sizes.vocabulary, width), "norm": _shape(width),
        "head": {"kernel": _shape(width, sizes.vocabulary)},
    }  # fmt: skip
    return apply, variables, jax.ShapeDtypeStruct((samples, sizes.positions), np.int32)


def _shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, np.float32)


def _dense_shapes(inputs: int, outputs: int) -> Shapes:
    return {"kernel": _shape(inputs, outputs), "bias": _shape(outputs)}


def _dense(v: Any, x: jax.Array) -> jax.Array:
    return x @ v["kernel"] + v["bias"]


def _layer_norm(v: Any, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * v["scale"] + v["bias"]


def _rms_norm(scale: jax.Array, x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def _heads(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:2], heads, -1)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, allowed: Any) -> jax.Array:
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(q.shape[-1])
    if allowed is not None:
        scores = jnp.where(allowed, scores, -1e9)
    values = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), v)
    return values.reshape(*values.shape[:2], -1)


def _rotary(positions: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    frequencies = 500000.0 ** -(np.arange(0, size, 2) / size)
    angles = np.outer(np.arange(positions), frequencies)[:, None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _rotate(x: jax.Array, table: tuple[np.ndarray, np.ndarray]) -> jax.Array:
    cos, sin = table
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
