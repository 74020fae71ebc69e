"""ONNX files whose layers onnxruntime and OpenVINO multiply in int8, with the reference's sums."""

import collections
import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import aquant_jax as aq
from aquant_jax.deployment import onnx_runtimes
from aquant_jax.deployment.onnx import to_onnx
from aquant_jax.errors import InputError
from tests.support.nets import normal, rng_of
from tests.support.onnx_marks import IGNORED_WARNINGS, NEEDS_JAX2ONNX

onnx = pytest.importorskip("onnx", reason="needs aquant-jax[onnx]")
pytestmark = [*IGNORED_WARNINGS, NEEDS_JAX2ONNX]
RUNTIMES = [
    pytest.param(
        runtime,
        marks=pytest.mark.skipif(
            not importlib.util.find_spec(runtime), reason=f"needs {runtime}: aquant-jax[bench]"
        ),
    )
    for runtime in onnx_runtimes.RUNTIMES
]


def same_padding(v, x):
    h = lax.conv_general_dilated(x, v["a"], (1, 1), "SAME", dimension_numbers=NHWC)
    h = jax.nn.relu(h)
    h = lax.conv_general_dilated(h, v["b"], (2, 2), "SAME", dimension_numbers=NHWC)
    return jax.nn.relu(h).mean((1, 2)) @ v["head"]


def uneven(v, x):
    """Channels first, dilation, strides and uneven padding."""
    h = lax.conv_general_dilated(
        x.transpose(0, 3, 1, 2), v["a"], (1, 2), ((2, 1), (0, 3)), rhs_dilation=(2, 1),
        dimension_numbers=("NCHW", "HWIO", "NCHW"),
    )  # fmt: skip
    h = lax.conv_general_dilated(
        jnp.tanh(h), v["b"], (1, 1), "VALID", dimension_numbers=("NCHW", "HWIO", "NHWC")
    )
    return h.mean((1, 2)) @ v["head"]


def grouped(v, x):
    """A depthwise layer and one of two groups, between plain ones."""
    h = lax.conv_general_dilated(x, v["a"], (1, 1), "SAME", dimension_numbers=NHWC)
    for name, groups in (("depthwise", 24), ("grouped", 2)):
        h = lax.conv_general_dilated(
            jax.nn.relu6(h), v[name], (1, 1), "SAME", dimension_numbers=NHWC,
            feature_group_count=groups,
        )  # fmt: skip
    return h.mean((1, 2)) @ v["head"]


def shortcut(v, x):
    """Strided layers of one and of more taps that read one tensor."""
    h = jax.nn.relu(lax.conv_general_dilated(x, v["a"], (1, 1), "SAME", dimension_numbers=NHWC))
    more = lax.conv_general_dilated(h, v["square"], (1, 1), "SAME", dimension_numbers=NHWC)
    h = jax.nn.relu(h + more)
    short = lax.conv_general_dilated(h, v["b"][:1, :1], (2, 2), "VALID", dimension_numbers=NHWC)
    h = lax.conv_general_dilated(h, v["b"], (2, 2), "SAME", dimension_numbers=NHWC)
    return (h + short).mean((1, 2)) @ v["head"]


def rows(v, x):
    """Convolutions over one axis."""
    numbers = ("NWC", "WIO", "NWC")
    h = lax.conv_general_dilated(x[:, 0], v["a"][0], (1,), "SAME", dimension_numbers=numbers)
    h = lax.conv_general_dilated(h, v["b"][0], (2,), ((1, 0),), dimension_numbers=numbers)
    return h.mean(1) @ v["head"]


def transposed(v, x):
    """A transposed layer, one that is strided too, and one of groups, which crops."""
    h = jax.nn.relu(lax.conv_transpose(x, v["a"], (2, 2), "SAME"))
    h = lax.conv_general_dilated(
        h, v["square"], (2, 1), ((1, 2), (0, -3)), (1, 2), (2, 1), dimension_numbers=NHWC
    )
    h = lax.conv_general_dilated(
        jnp.tanh(h), v["grouped"], (1, 1), ((-1, 1), (2, -2)), (2, 1), dimension_numbers=NHWC,
        feature_group_count=2,
    )  # fmt: skip
    return h.mean((1, 2)) @ v["head"]


def cropped(v, x):
    """Thin layers, whose products are of floats."""
    h = lax.conv_general_dilated(
        x[..., :12], v["a"][:, :, :12], (1, 1), ((-1, 1), (0, -2)), dimension_numbers=NHWC
    )
    h = jax.nn.relu(h)[..., :12]
    h = lax.conv_general_dilated(
        h, v["b"][:, :, :12], (2, 1), ((0, 2), (-1, 1)), (1, 3), dimension_numbers=NHWC
    )
    return h.mean((1, 2)) @ v["head"]


def dense(v, x):
    """Dense layers over tokens, one with the weight first and one over two axes."""
    h = jnp.tanh(x[:, 0] @ v["a"][0, 0])
    h = jnp.einsum("io,bti->obt", v["b"][0, 0], h)
    return jnp.einsum("obt,otc->bc", h, v["tokens"])


NHWC = ("NHWC", "HWIO", "NHWC")
X = normal(rng_of(1), 12, 9, 8, 20)
VARIABLES = {
    "a": normal(rng_of(2), 3, 3, 20, 24) / 8,
    "b": normal(rng_of(3), 3, 3, 24, 32) / 8,
    "square": normal(rng_of(9), 3, 3, 24, 24) / 8,
    "depthwise": normal(rng_of(4), 3, 3, 1, 24),
    "grouped": normal(rng_of(5), 3, 3, 12, 32) / 8,
    "head": normal(rng_of(6), 32, 5),
    "tokens": normal(rng_of(7), 32, 8, 5),
}


@functools.cache
def quantized(net, granularity, bits):
    fields = {"batch_size": 6, "quantize_input": True, "weight_bits": bits, "act_bits": bits}
    if granularity == "nearest":
        recipe = aq.recipes.nearest(**fields)
    else:
        recipe = aq.recipes.aquant(**fields, steps=0, border_granularity=granularity)
    network = aq.quantize(net, VARIABLES, X, recipe, observer=aq.Observer())
    rng, layers = rng_of(8), {}
    for path, layer in network.layers.items():  # borders as if they were learned
        border = {
            name: value + np.float32(0.1 / 4**power) * normal(rng, *value.shape)
            for power, (name, value) in enumerate(layer.border.items())
        }
        layers[path] = layer._replace(border=border)
    return dataclasses.replace(network, layers=layers)


def written(network, runtime, folder):
    model = to_onnx(network, runtime=runtime)
    onnx.checker.check_model(model, full_check=True)
    path = folder / "network.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def int8_layers(path, runtime):
    """How many products the runtime multiplies in int8, and how many in float."""
    if runtime == "openvino":
        openvino = importlib.import_module("openvino")
        model = openvino.Core().compile_model(str(path), "CPU", {"PERF_COUNT": True})
        request = model.create_infer_request()
        request.infer([X])
        products = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul")
        kinds = [
            node.exec_type for node in request.get_profiling_info()
            if node.node_type.startswith(products)
        ]  # fmt: skip
        whole = sum("I8" in kind for kind in kinds)
        return whole, len(kinds) - whole
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path) + ".optimized"
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = collections.Counter(
        node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node
    )
    return kinds["MatMulIntegerToFloat"], kinds["Conv"] + kinds["MatMul"] + kinds["Gemm"]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("net", "granularity", "bits", "int8"),
    [
        # OpenVINO sums the windows of the first layer, whose 8 bits need it, in one more product.
        (same_padding, "channel", 4, {"onnxruntime": (3, 0), "openvino": (4, 0)}),
        (same_padding, "element", 4, {"onnxruntime": (3, 0), "openvino": (3, 0)}),
        (grouped, "channel", 4, {"onnxruntime": (2, 2), "openvino": (5, 0)}),
        (rows, "channel", 4, {"onnxruntime": (3, 0), "openvino": (4, 0)}),
        (dense, "channel", 4, {"onnxruntime": (3, 0), "openvino": (3, 0)}),
        (same_padding, "nearest", 4, {"onnxruntime": (3, 0), "openvino": (4, 0)}),
        (uneven, "nearest", 5, {}), (shortcut, "nearest", 3, {}),
        (transposed, "channel", 8, {}), (cropped, "nearest", 8, {}),
        *(
            pytest.param(*case, {}, marks=pytest.mark.slow)
            for case in (
                (same_padding, "nearest", 8), (uneven, "channel", 8), (grouped, "mean", 4),
                (shortcut, "element", 8), (rows, "mean", 3), (dense, "nearest", 8),
                (same_padding, "mean", 8), (uneven, "element", 3), (grouped, "element", 8),
                (same_padding, "channel", 3), (rows, "channel", 8), (dense, "element", 3),
            )
        ),
    ],
    ids=lambda value: getattr(value, "__name__", "" if isinstance(value, dict) else None),
)  # fmt: skip
def test_outputs_are_the_references_and_products_in_int8(
    net, granularity, bits, int8, runtime, tmp_path
):
    network = quantized(net, granularity, bits)
    path = written(network, runtime, tmp_path)
    run = onnx_runtimes.load(path, runtime)
    expected = np.asarray(network(X))
    for samples in (len(X), 1):
        (found,) = run(X[:samples])
        assert np.ptp(expected[:samples]) > 0.1
        np.testing.assert_allclose(found, expected[:samples], rtol=2e-5, atol=2e-5)
    if int8:
        assert int8_layers(path, runtime) == int8[runtime]
    if int8 and runtime == "openvino" and net is same_padding:  # at both ends; it moves none itself
        kinds = [node.op_type for node in onnx.load(path).graph.node]
        assert kinds.count("Transpose") <= 2


def test_weights_of_up_to_four_bits_take_half_a_byte():
    for bits, name, size in ((4, "b:codes", 0.5), (5, "b:whole", 1.0)):
        model = to_onnx(quantized(same_padding, "nearest", bits))
        (codes,) = (t for t in model.graph.initializer if t.name == name)
        assert len(codes.raw_data) == size * VARIABLES["b"].size


def test_an_unknown_runtime_is_one_line(tmp_path):
    network = quantized(dense, "nearest", 4)
    for call in (
        lambda: to_onnx(network, runtime="tensorrt"),
        lambda: onnx_runtimes.load(tmp_path / "network.onnx", "tensorrt"),
    ):
        with pytest.raises(InputError, match="runtime is 'tensorrt', not one of onnxruntime, open"):
            call()
