"""Bad input of the img2col operations: named in Python, checked again by the handlers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpu_ops
from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.layers.conv_geometry import ConvGeometry
from gpu_ops import targets
from tests.support.img2col_reference import Case


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": np.zeros((6, 5, 4), np.float32)}, "x has shape (6, 5, 4), not four axes"),
        ({"x": np.zeros((2, 6, 5, 4), np.float16)}, "x is float16, not one of float32, bfloat16"),
        ({"b0": np.zeros((4, 9), np.float32)}, "'b0' has shape (4, 9), not (9, 4)"),
        ({"b1": None}, "'b1' has shape None, not (9, 4)"),
        ({"b3": np.zeros((9, 4), np.float32)}, "'b3' is not one of border 'quadratic'"),
        ({"b2": np.zeros((9, 4), np.float16)}, "'b2' is float16, not float32"),
        ({"border": None}, "'b0' is not one of border None: []"),
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
    case = Case(**{k: v for k, v in change.items() if k in Case._fields})
    named = {k: jnp.asarray(v) for k, v in known.items() if k[0] == "b" and k[1:].isdigit()
             and v is not None}  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(words)):
        gpu_ops.img2col_border(
            jnp.asarray(known["x"]), ActivationQuantizer(known["step"], known["zero"]), named,
            case.rounding(), case.geometry(), output=case.output, align=case.align,
        )  # fmt: skip


def geometry_of(**changes):
    return Case().geometry()._replace(**changes)


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        (geometry_of(spatial=(5, 6)), "x has shape (2, 6, 5, 4), the geometry one or two spatial "
                                      "axes of sizes (5, 6)"),
        (ConvGeometry((6,), (3,), (1,), (1,), ((1, 1),)), "axes of sizes (6,)"),
        (geometry_of(kernel=(9, 3)), "a window of (9, 3) is larger than the padded input, (8, 7)"),
        (geometry_of(kernel=(3,)), "kernel is (3,), not two positive integers"),
        (geometry_of(strides=(0, 1)), "strides is (0, 1), not two positive integers"),
        (geometry_of(dilation=(True, 1)), "dilation is (True, 1), not two positive integers"),
        (geometry_of(padding="SAME"), "padding is SAME, not two pairs of non-negative integers"),
        (geometry_of(padding=((0, -1), (1, 1))), "padding is ((0, -1), (1, 1)), not two pairs"),
        (geometry_of(groups=3), "groups is 3, which does not divide the 4 channels of x"),
    ],
    ids=str,
)  # fmt: skip
def test_a_geometry_made_by_hand_is_checked_too(geometry, words):
    x, quantizer = jnp.zeros(Case().shape), ActivationQuantizer(jnp.float32(1), jnp.float32(0))
    for call in (
        lambda: gpu_ops.img2col(x, geometry),
        lambda: gpu_ops.img2col_border(x, quantizer, {}, Case(border=None).rounding(), geometry),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


def test_lists_and_numpys_integers_are_sizes():
    case = Case()
    geometry = gpu_ops.conv_geometry(
        list(case.shape), [np.int64(3), 3], strides=[1, 1], padding=[[1, 1], [1, 1]]
    )
    assert geometry == case.geometry()
    unhashable = geometry._replace(kernel=[3, 3], padding=[[1, 1], [1, 1]])
    x = jnp.asarray(case.operands()[0])
    np.testing.assert_array_equal(gpu_ops.img2col(x, unhashable), gpu_ops.img2col(x, geometry))


def test_the_geometry_is_one_of_four_axes():
    with pytest.raises(ValueError, match=re.escape("x has shape (2, 6, 4), not four axes")):
        gpu_ops.conv_geometry((2, 6, 4), (3,), padding="SAME")


def test_a_border_that_a_user_registered_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(borders, "BORDERS", dict(borders.BORDERS))
    borders.register("mine", *borders.get("constant")[:2])
    case = Case(border="mine")
    words = r"border 'mine' has no custom call.*ReferenceBackend serves it"
    with pytest.raises(ValueError, match=words):
        case.run(jnp.zeros(case.shape), 1.0, 0.0, {})


def test_too_many_elements_for_the_index_are_refused():
    x = jax.ShapeDtypeStruct((1, 20000, 20000, 1), jnp.float32)
    geometry = gpu_ops.conv_geometry(x.shape, (3, 3), padding="SAME")
    with pytest.raises(ValueError, match="columns have 3600000000 elements; at most 2147483647"):
        jax.eval_shape(lambda x: gpu_ops.img2col(x, geometry), x)


@pytest.mark.parametrize("size", [0.0, -1.0, np.nan, np.inf])
def test_a_step_size_that_is_known_only_when_run_is_an_error_then(size):
    case = Case(border=None)
    run = jax.jit(lambda s: case.run(jnp.zeros(case.shape), s, 0.0, {}))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"the step size is .*not positive"):
        run(jnp.float32(size)).block_until_ready()


ATTRIBUTES = {
    "kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1), "padding": (1, 1, 1, 1), "groups": 1,
    "bits": 4, "shared_across_taps": True, "phi": 0,
}  # fmt: skip
ARRAYS = {
    "result": (2, 6, 5, 1, 36), "out": "int8", "x": "float32", "shape": (2, 6, 5, 4), "scalar": (),
    "coefficients": (3, 9, 4),
}  # fmt: skip
OF_THE_ROUNDING = ("bits", "shared_across_taps", "phi")


def raw_call(name="gpu_ops_img2col_border", **changed):
    """The custom call without Python's checks; `changed`: attributes, shapes and dtypes."""
    attributes = ATTRIBUTES | {k: v for k, v in changed.items() if k in ATTRIBUTES}
    arrays = ARRAYS | {k: v for k, v in changed.items() if k in ARRAYS}
    assert changed.keys() <= attributes.keys() | arrays.keys()
    if name == "gpu_ops_img2col":
        attributes = {k: v for k, v in attributes.items() if k not in OF_THE_ROUNDING}
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(arrays["result"], arrays["out"]))
    converted = {
        k: np.bool_(v) if isinstance(v, bool) else np.asarray(v, np.int64)[()]
        for k, v in attributes.items()
        if v is not None
    }
    operands = [jnp.zeros(arrays["shape"], arrays["x"])]
    if name != "gpu_ops_img2col":
        scalar = arrays["scalar"]
        operands += [jnp.full(scalar, 1.0), jnp.zeros(scalar), jnp.zeros(arrays["coefficients"])]
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
        (
            {
                "shape": (1, 1, 1, 1),
                "kernel": (1, 1),
                "stride": (1, 2**29),
                "groups": 1,
                "padding": (0, 0, 2**29, 2**29),
                "result": (1, 1, 3, 1, 1),
                "coefficients": (3, 1, 1),
            },
            "needs 4294967[0-9]{3} bytes of scratch, above the limit of 268435[0-9]{3} for",
        ),
    ],
    ids=str,
)
def test_the_handler_checks_again_and_never_crashes(changed, words):
    with pytest.raises(jax.errors.JaxRuntimeError, match=words):
        raw_call(**changed)


def test_operations_of_deployment_have_no_derivative():
    case = Case()
    x, step, zero, coefficients = case.operands()
    values = case._replace(output="float32")
    for run in (
        lambda x: values.run(x, step, zero, coefficients),
        lambda x: gpu_ops.img2col(x, case.geometry()),
    ):
        with pytest.raises(NotImplementedError, match="Differentiation rule"):
            jax.grad(lambda x, run=run: run(x).sum())(jnp.asarray(x))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpu_ops_img2col_border", r"built without CUDA.*GPU_OPS_CUDA=ON"),
        ("gpu_ops_border_conv", "for the CPU alone"),
        ("gpu_ops_conv_tuned", "built without CUDA"),
    ],
)
def test_an_operation_that_cuda_lacks_says_why(name, words):
    handler = targets.MISSING[name]
    jax.ffi.register_ffi_target(f"{name}_missing", handler, platform="cpu")
    with pytest.raises(jax.errors.JaxRuntimeError, match=words):
        raw_call(f"{name}_missing")
