"""Bad input of the img2col operations: named in Python, checked again by the handlers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpu_ops
from aquant_jax.arithmetic import border as borders
from tests.support.img2col_reference import Case


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": np.zeros((6, 5, 4), np.float32)}, "x has shape (6, 5, 4), not four axes"),
        ({"x": np.zeros((2, 6, 5, 4), np.float16)}, "x is float16, not one of float32, bfloat16"),
        ({"b0": np.zeros((4, 9), np.float32)}, "'b0' has shape (4, 9), not (9, 4)"),
        ({"b1": None}, "'b1' has shape None, not (9, 4)"),
        ({"b3": np.zeros((9, 4), np.float32)}, "'b3' is none of border 'quadratic'"),
        ({"b2": np.zeros((9, 4), np.float16)}, "'b2' is float16, not float32"),
        ({"border": "none"}, "'b0' is none of border 'none': []"),
        ({"border": "mine"}, "border 'mine' has no custom call"),
        ({"phi": "sigmoid"}, "phi is 'sigmoid', not 'identity' or 'clamp'"),
        ({"output": "uint8"}, "output is 'uint8', not one of ['int8', 'float32']"),
        ({"groups": 3}, "groups is 3, which does not divide the 4 channels"),
        ({"groups": 0}, "groups is 0"),
        ({"align": 0}, "align is 0, not a positive integer"),
        ({"kernel": (1.5, 3)}, "kernel is (1.5, 3), not two positive integers"),
        ({"padding": ((0.5, 1), (1, 1))}, "not two pairs of non-negative integers"),
        ({"bits": 1}, "bits is 1, not an integer of 2 to 8"),
        ({"bits": 9}, "bits is 9, not an integer of 2 to 8"),
        ({"kernel": (9, 3)}, "a window of (9, 3) is larger than the padded input, (8, 7)"),
        ({"dilation": (1, 4)}, "a window of (3, 9) is larger than the padded input, (8, 7)"),
        ({"kernel": (3,)}, "kernel is (3,), not two positive integers"),
        ({"kernel": 3}, "kernel is 3, not two positive integers"),
        ({"padding": 1}, "padding is 1, not two pairs"),
        ({"bits": 4.5}, "bits is 4.5, not an integer of 2 to 8"),
        ({"bits": "4"}, "bits is 4, not an integer of 2 to 8"),
        ({"step": 1e-46}, "step_size is 1e-46, not positive"),
        ({"step": 1e39}, "step_size is 1e+39, not positive"),
        ({"strides": (1, 0)}, "strides is (1, 0), not two positive integers"),
        ({"padding": "FULL"}, "padding is 'FULL', not 'SAME', 'VALID' or pairs"),
        ({"padding": ((1, -1), (0, 0))}, "padding is ((1, -1), (0, 0)), not two pairs"),
        ({"padding": ((1, 1),)}, "padding is ((1, 1),), not two pairs"),
        ({"step": 0.0}, "step_size is 0.0, not positive"),
        ({"step": -0.5}, "step_size is -0.5, not positive"),
        ({"step": np.float32(np.nan)}, "step_size is nan, not positive"),
        ({"step": np.ones(3, np.float32)}, "step_size has shape (3,), not ()"),
        ({"zero": 16.0}, "zero_point is 16.0, not an integer of 0 to 15"),
        ({"zero": 1.5}, "zero_point is 1.5, not an integer of 0 to 15"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change, words):
    x, step, zero, coefficients = Case().operands()
    known = {"x": x, "step": step, "zero": zero, **coefficients} | change
    options = Case().options() | {k: v for k, v in change.items() if k in Case._fields}
    named = {k: jnp.asarray(v) for k, v in known.items() if k[0] == "b" and k[1:].isdigit()
             and v is not None}  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(words)):
        gpu_ops.img2col_border(
            jnp.asarray(known["x"]), known["step"], known["zero"], named, **options
        )


def test_a_border_that_a_user_registered_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(borders, "BORDERS", dict(borders.BORDERS))
    borders.register("mine", *borders.get("constant")[:2])
    x, options = jnp.zeros(Case().shape), Case(border="mine").options()
    with pytest.raises(ValueError, match=r"border 'mine' has no custom call.*the jnp path serves"):
        gpu_ops.img2col_border(x, 1.0, **options)


def test_too_many_elements_for_the_index_are_refused():
    x = jax.ShapeDtypeStruct((1, 20000, 20000, 1), jnp.float32)
    with pytest.raises(ValueError, match="columns have 3600000000 elements; at most 2147483647"):
        jax.eval_shape(lambda x: gpu_ops.img2col(x, kernel=(3, 3), padding="SAME"), x)


@pytest.mark.parametrize("size", [0.0, -1.0, np.nan, np.inf])
def test_a_step_size_that_is_known_only_when_run_is_an_error_then(size):
    case = Case(border="none")
    x = jnp.zeros(case.shape)
    run = jax.jit(lambda s: gpu_ops.img2col_border(x, s, **case.options()))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"the step size is .*not positive"):
        run(jnp.float32(size)).block_until_ready()


def raw_call(name="gpu_ops_img2col_border", result=(2, 6, 5, 1, 36), out="int8", x="float32",
             scalar=(), coefficients=(3, 9, 4), shape=(2, 6, 5, 4), **changed):  # fmt: skip
    """The custom call without what Python checks."""
    attributes = {
        "kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1), "padding": (1, 1, 1, 1),
        "groups": 1, "bits": 4, "fused": True, "phi": 0,
    } | changed  # fmt: skip
    if name == "gpu_ops_img2col":
        attributes = {k: v for k, v in attributes.items() if k not in ("bits", "fused", "phi")}
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(result, out))
    converted = {
        k: np.bool_(v) if isinstance(v, bool) else np.asarray(v, np.int64)[()]
        for k, v in attributes.items()
        if v is not None
    }
    operands = [jnp.zeros(shape, x)]
    if name != "gpu_ops_img2col":
        operands += [jnp.full(scalar, 1.0), jnp.zeros(scalar), jnp.zeros(coefficients)]
    return jax.jit(lambda *o: call(*o, **converted))(*operands).block_until_ready()


def test_the_raw_call_itself_works():
    assert raw_call().shape == (2, 6, 5, 1, 36)
    assert raw_call("gpu_ops_img2col", out="float32").shape == (2, 6, 5, 1, 36)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"kernel": (3,)}, "need two sizes each"),
        ({"padding": (1, 1)}, "padding four"),
        ({"stride": (0, 1)}, "a window has 0"),
        ({"kernel": (-3, 3)}, "a window has -3"),
        ({"dilation": (2**40, 1)}, "a window has 1099511627776"),
        ({"padding": (-1, 1, 1, 1)}, "the padding has -1"),
        ({"kernel": (9, 3)}, "a window of 9 does not fit the padded size 8"),
        ({"groups": 3}, "3 groups do not divide 4 channels"),
        ({"groups": 0}, "0 groups do not divide"),
        ({"groups": None}, "[Aa]ttribute"),
        ({"bits": 9}, "bits must be 2 to 8, not 9"),
        ({"bits": 0}, "bits must be 2 to 8, not 0"),
        ({"phi": 3}, "unknown phi 3"),
        ({"coefficients": (1, 9, 5)}, "45 coefficients for columns of 36"),
        ({"coefficients": (4, 9, 4)}, "144 coefficients for columns of 36"),
        ({"scalar": (2,)}, "one number each"),
        ({"result": (2, 6, 5, 1, 35)}, "a shape that does not fit"),
        ({"result": (2, 6, 6, 1, 36)}, "a shape that does not fit"),
        ({"result": (2, 6, 5, 36)}, "a shape that does not fit"),
        ({"shape": (2, 6, 5)}, "x has 3 axes, not 4"),
        ({"out": "int32"}, "gives int8 or float32"),
        ({"x": "float16"}, "takes float32 or bfloat16"),
        ({"name": "gpu_ops_img2col"}, "changes no dtype"),
        ({"result": (2, 6, 5, 1, 2**27)}, "too large for 32-bit indices"),
    ],
    ids=str,
)
def test_the_handler_checks_again_and_never_crashes(changed, words):
    with pytest.raises(jax.errors.JaxRuntimeError, match=words):
        raw_call(**changed)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpu_ops_img2col_border", r"built without CUDA.*GPU_OPS_CUDA=ON"),
        ("gpu_ops_border_conv", "for the CPU alone"),
        ("gpu_ops_conv_tuned", "built without CUDA"),
    ],
)
def test_an_operation_that_cuda_lacks_says_why(name, words):
    handler = gpu_ops.targets._cpu.missing()[name]
    jax.ffi.register_ffi_target(f"{name}_missing", handler, platform="cpu")
    with pytest.raises(jax.errors.JaxRuntimeError, match=words):
        raw_call(f"{name}_missing")
