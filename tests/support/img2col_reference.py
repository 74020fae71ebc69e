"""``gpu_ops.img2col_border`` in plain numpy, from docs/explanation/method.md, and cases."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gpu_ops
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.layers.column import Rounding

NAMES = {
    None: (),
    "constant": ("b0",),
    "linear": ("b0", "b1"),
    "quadratic": ("b0", "b1", "b2"),
}
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}
TINY = np.finfo(np.float32).tiny


def flush(a):
    """Subnormal numbers count as zero."""
    a = np.asarray(a, np.float32)
    return np.where(np.abs(a) < TINY, np.float32(0), a)


def gather(x, case):
    """[N, H, W, C] -> [N, OH, OW, taps, C], zeros around."""
    x = np.pad(x, ((0, 0), *case.padding, (0, 0)))
    (kh, kw), (sh, sw), (dh, dw) = case.kernel, case.strides, case.dilation
    height = (x.shape[1] - (kh - 1) * dh - 1) // sh + 1
    width = (x.shape[2] - (kw - 1) * dw - 1) // sw + 1
    rows = [
        x[:, i * dh : i * dh + sh * height : sh, j * dw : j * dw + sw * width : sw][
            :, :height, :width
        ]
        for i in range(kh)
        for j in range(kw)
    ]
    return np.stack(rows, axis=3)


def by_group(every, case):
    """[..., taps, C] -> [..., groups, Kp]."""
    *lead, taps, channels = every.shape
    every = every.reshape(*lead, taps, case.groups, channels // case.groups)
    every = np.moveaxis(every, -2, -3).reshape(*lead, case.groups, -1)
    extra = -every.shape[-1] % case.align
    return np.pad(every, [(0, 0)] * (every.ndim - 1) + [(0, extra)])


def reference(x, step, zero, coefficients, case):
    """The columns of docs/explanation/method.md in numpy, operation by operation in float32."""
    one = np.float32
    with np.errstate(all="ignore"):
        inverse = flush(one(1) / one(step))
        u = np.clip(flush(flush(gather(x, case)) * inverse), one(-(2**23)), one(2**23))
        border = one(0.5)
        if case.border is not None:
            border = np.broadcast_to(flush(coefficients[NAMES[case.border][-1]]), u.shape)
            for name in reversed(NAMES[case.border][:-1]):
                border = flush(flush(border * u) + flush(coefficients[name]))
            if case.shared_across_taps:
                total = border[..., 0, :]
                for tap in range(1, border.shape[-2]):
                    total = flush(total + border[..., tap, :])
                border = flush(total * (one(1) / one(border.shape[-2])))[..., None, :]
            if case.phi == "clamp":
                border = np.clip(border, one(0), one(1 - 2**-24))
        raw = np.ceil(flush(u - border)) + one(zero)
        codes = np.where(np.isnan(raw), one(0), np.clip(raw, one(0), one(2**case.bits - 1)))
    if case.output == "float32":
        return by_group(one(step) * (codes - one(zero)), case)
    return by_group((codes - (128 if case.bits == 8 else 0)).astype(np.int8), case)


class Case(NamedTuple):
    """Everything static about one call, and the shape of x."""

    shape: tuple = (2, 6, 5, 4)
    kernel: tuple = (3, 3)
    strides: tuple = (1, 1)
    padding: tuple = ((1, 1), (1, 1))
    dilation: tuple = (1, 1)
    groups: int = 1
    bits: int = 4
    border: str | None = "quadratic"
    phi: str = "clamp"
    shared_across_taps: bool = True
    output: str = "int8"
    align: int = 1
    dtype: str = "float32"

    def geometry(self):
        names = ("kernel", "strides", "padding", "dilation", "groups")
        return gpu_ops.conv_geometry(self.shape, **{name: getattr(self, name) for name in names})

    def rounding(self):
        return Rounding(self.bits, self.border, self.phi, self.shared_across_taps)

    def operands(self, seed=0, dyadic=False):
        """x, step size, zero point, coefficients."""
        rng = np.random.default_rng(seed)

        def normal(*shape):
            values = rng.normal(size=shape).astype(np.float32)
            return np.round(values * 16) / 16 if dyadic else values

        x = np.asarray(jnp.asarray(normal(*self.shape), self.dtype)).astype(np.float32)
        step = np.float32(0.25 if dyadic else rng.uniform(0.02, 0.7))
        shape = (int(np.prod(self.kernel)), self.shape[-1])
        scales = {"b0": 0.5, "b1": 0.25, "b2": 0.125}
        coefficients = {
            name: normal(*shape) * np.float32(scales[name]) + np.float32(name == "b0") / 2
            for name in NAMES[self.border]
        }
        return x, step, float(rng.integers(0, 2**self.bits)), coefficients

    def run(self, x, step, zero, coefficients):
        case = self._replace(shape=x.shape)  # of another number of images, perhaps
        coefficients = {name: jnp.asarray(c) for name, c in coefficients.items()}
        return gpu_ops.img2col_border(
            jnp.asarray(x).astype(self.dtype), ActivationQuantizer(step, zero), coefficients,
            self.rounding(), case.geometry(), output=self.output, align=self.align,
        )  # fmt: skip


def random_case(seed):
    """A case that fits: window, padding, strides, groups, bits and border at random."""
    rng = np.random.default_rng([7, seed])

    def pick(*values):
        return values[rng.integers(len(values))]

    def pair(*values):
        return (pick(*values), pick(*values))

    groups = pick(1, 1, 1, 2, 3)
    channels = groups * pick(1, 2, 5, 8, 16, 17, 32)
    groups = pick(groups, groups, channels)
    kernel, dilation = pair(1, 2, 3, 3, 5), pair(1, 1, 2, 3)
    padding = (pair(0, 1, 2), pair(0, 1, 3))
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = [
        max(span - sum(pads), 1) + int(rng.integers(0, 7))
        for span, pads in zip(spans, padding, strict=True)
    ]
    return Case(
        (pick(1, 2, 3), *sizes, channels), kernel, pair(1, 1, 2, 3), padding, dilation, groups,
        int(rng.integers(2, 9)), pick(*NAMES), pick("clamp", "identity"), pick(True, False),
        pick("int8", "float32"), pick(1, 4, 5, 16), pick("float32", "bfloat16"),
    )  # fmt: skip


def together(functions):
    """The functions in one program, which compiles in a tenth of the time of one program each."""

    def run(operands):
        return [function(*own) for function, own in zip(functions, operands, strict=True)]

    return jax.jit(run, compiler_options=FAST_TO_COMPILE)


def plain(cases):
    """Calls of `gpu_ops.img2col`, and an x of every dtype for each."""
    arrays = []
    for seed, case in enumerate(cases):
        x = case.operands(seed)[0]
        arrays.append((x * 10).astype(np.int8) if seed % 3 == 0 else x.astype(case.dtype))
    calls = [lambda x, case=case: gpu_ops.img2col(x, case.geometry(), case.align) for case in cases]
    return calls, arrays


def contractible():
    """A case and operands whose codes change where a product is not rounded before it is added."""
    rng, one = np.random.default_rng(0), np.float32
    u, b1 = (rng.uniform(*ends, 4096).astype(one) for ends in ((1, 7), (0.5, 1.5)))
    b0 = (u - np.round(u)) - b1 * u  # so u - (b1 u + b0) is an integer, but for the last digits
    case = Case((1, 1, 1, 4096), (1, 1), padding=((0, 0), (0, 0)), border="linear", phi="identity")
    return case, (u.reshape(case.shape), one(1.0), 0.0, {"b0": b0[None], "b1": b1[None]})


def assert_same(found, expected):
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(found), expected)
