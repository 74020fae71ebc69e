"""An export by launch.export computes what the network computes, on other runtimes."""

import contextlib
import dataclasses
import functools
import json
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax import data
from aquant_jax.deployment import onnx as onnx_export
from aquant_jax.deployment import onnx_runtimes, stablehlo
from aquant_jax.errors import InputError
from aquant_jax.storage import archive
from launch import export
from tests.support.nets import conv, images, mlp, normal, rng_of, small_net
from tests.support.onnx_marks import IGNORED_WARNINGS, NEEDS_JAX2ONNX
from tests.support.process import run_python

onnx = pytest.importorskip("onnx", reason="needs aquant-jax[onnx]")
pytestmark = [*IGNORED_WARNINGS, NEEDS_JAX2ONNX]
X = images(0, 8, size=5)


def odd_net():
    """Groups, a depthwise layer with strides and dilation, uneven padding, and two heads."""
    rng = rng_of(5)
    variables = {
        "stem": normal(rng, 2, 2, 3, 8) / 3,
        "grouped": normal(rng, 3, 2, 4, 8) / 4,
        "depthwise": normal(rng, 2, 2, 1, 8) / 2,
        "heads": normal(rng, 8, 2, 3),
    }

    def apply(v, x):
        h = jax.nn.relu(conv(x, v["stem"], padding=((1, 0), (0, 1))))
        h = jax.nn.relu(conv(h, v["grouped"], groups=2, padding=((1, 1), (1, 0))))
        h = jnp.pad(h, ((0, 0), (1, 0), (0, 0), (0, 0)))
        h = jax.nn.relu(conv(h, v["depthwise"], (2, 1), ((0, 0), (1, 1)), 8, (1, 2)))
        heads = jnp.einsum("nc,chd->nhd", jnp.mean(h, (1, 2)), v["heads"])
        return {"first": heads[:, 0], "both": heads}

    return apply, variables


@functools.cache
def quantized(net, granularity="element", bits=2):
    """Rounded to nearest, then with borders as if they were learned."""
    apply, variables = net()
    recipe = aq.recipes.aquant(bits, bits, steps=0, batch_size=4, border_granularity=granularity)
    network = aq.quantize(apply, variables, X, recipe, observer=aq.Observer())
    rng, layers = rng_of(7), {}
    for path, layer in network.layers.items():
        border = {
            name: value + np.float32(0.1 / 4**power) * normal(rng, *value.shape)
            for power, (name, value) in enumerate(layer.border.items())
        }
        layers[path] = layer._replace(border=border)
    return dataclasses.replace(network, layers=layers)


def assert_same_outputs(found, expected):
    expected = jax.tree.leaves(expected)
    assert len(found) == len(expected)
    for left, right in zip(found, map(np.asarray, expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5 * np.abs(right).max())


@pytest.mark.parametrize(
    ("net", "granularity", "bits"),
    [
        (odd_net, "mean", 3),
        # tests/deployment/test_onnx_integers.py has the other borders, and shortcuts.
        *(pytest.param(net, "channel", 3, marks=pytest.mark.slow) for net in (small_net, odd_net)),
        pytest.param(small_net, "mean", 4, marks=pytest.mark.slow),
        pytest.param(odd_net, "element", 3, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_onnxruntime_gives_the_same_outputs(tmp_path, net, granularity, bits):
    network = quantized(net, granularity, bits)
    model = onnx_export.to_onnx(network)
    onnx.checker.check_model(model, full_check=True)
    path = tmp_path / "network.onnx"
    path.write_bytes(model.SerializeToString())
    run = onnx_runtimes.load(path)
    several = np.concatenate([X, X[:3]])
    expected = network(several)
    for samples in (len(several), len(X), 1):
        first = jax.tree.map(lambda y, samples=samples: y[:samples], expected)
        assert_same_outputs(run(several[:samples]), first)
    kinds = {t.name: t.data_type for t in model.graph.initializer if t.name.endswith(":codes")}
    small = {spec.path for spec in network.specs if spec.weight_bits <= 4}
    assert {kinds[f"{path}:codes"] for path in small} == {onnx.TensorProto.UINT4}


def test_onnxruntime_gives_the_same_bits_where_all_sums_are_of_whole_numbers(tmp_path):
    x, (apply, variables) = normal(rng_of(0), 32, 6), mlp(sizes=(6, 64, 4))
    recipe = aq.recipes.nearest(4, 4, batch_size=8, quantize_input=True)
    inputs = {"gain": np.float32(2), "x": x}

    def squared(v, x):
        y = apply(v, x["x"])
        return x["gain"] * jnp.einsum("nc,ndc->ncd", y, y[:, None])  # sums over no axis

    network = aq.quantize(squared, variables, inputs, recipe, observer=aq.Observer())
    path = tmp_path / "network.onnx"
    path.write_bytes(onnx_export.to_onnx(network).SerializeToString())
    for batch in (
        inputs,
        {**inputs, "x": x.astype(np.float64)},
    ):  # NumPy's default
        np.testing.assert_array_equal(onnx_runtimes.load(path)(batch)[0], network(inputs))


def test_onnx_names_inputs_and_outputs_by_their_paths():
    model = onnx_export.to_onnx(quantized(odd_net, "mean", 3))
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "input": ["samples", 5, 5, 3],
        "both": ["samples", 2, 3],
        "first": ["samples", 3],
    }


def test_a_size_that_must_be_known_is_fixed(tmp_path):
    kernel, cumsum = normal(rng_of(0), 75, 4), jnp.cumsum
    network = aq.quantize(
        lambda variables, x: jnp.cumsum(x.reshape(len(x), -1), 1) @ variables["kernel"],
        {"kernel": kernel}, X, aq.recipes.nearest(batch_size=4), observer=aq.Observer(),
    )  # fmt: skip
    path = tmp_path / "network.onnx"
    path.write_bytes(onnx_export.to_onnx(network).SerializeToString())
    assert jnp.cumsum is cumsum  # jax2onnx replaces it
    assert_same_outputs(onnx_runtimes.load(path)(X[:7]), network(X[:7]))
    program = stablehlo.self_contained(network)
    np.testing.assert_allclose(program.call(X[:4]), network(X[:4]), rtol=1e-5)


def test_what_onnx_lacks_is_one_line():
    def apply(variables, x):
        y = x.reshape(x.shape[0], -1) @ variables["kernel"]
        return jax.lax.linalg.qr(y.reshape(-1, 2, 2))[0].reshape(-1, 4)

    network = aq.quantize(
        apply, {"kernel": normal(rng_of(0), 75, 4)}, X, aq.recipes.nearest(batch_size=4),
        observer=aq.Observer(),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"cannot become ONNX: .*qr"):
        onnx_export.to_onnx(network)


@pytest.mark.parametrize(
    ("runtime", "missing"), [("onnxruntime", "jax2onnx"), ("openvino", "onnxruntime")]
)
def test_a_package_that_is_not_installed_is_named_in_one_line(monkeypatch, runtime, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        InputError, match=rf"ONNX needs {missing}: pip install -e '\.\[onnx\]' in the clone$"
    ):
        onnx_export.to_onnx(quantized(odd_net, "mean", 3), runtime=runtime)


def test_a_restored_network_needs_the_code_for_onnx(tmp_path):
    aq.save(quantized(odd_net, "mean", 3), tmp_path / "saved")
    restored = aq.restore(tmp_path / "saved")
    with pytest.raises(InputError, match="the ONNX export needs the model's code"):
        onnx_export.to_onnx(restored)
    program = stablehlo.self_contained(restored)
    expected = quantized(odd_net, "mean", 3)(X[:3])
    jax.tree.map(np.testing.assert_array_equal, program.call(X[:3]), expected)


@pytest.fixture
def argv(finished_run, tmp_path):
    return ["export", f"--workdir={shutil.copytree(finished_run, tmp_path / 'run')}"]


def run_stablehlo(folder):
    """In a process of its own, without the library, and first without the operations."""
    return run_python(f"""
import jax, numpy as np, sys
x = np.zeros((3, 8, 8, 1), np.float32)
def run(name):
    return jax.export.deserialize(bytearray(open(f"{folder}/{{name}}", "rb").read())).call(x)
plain = run("network.stablehlo")
try:
    run("network_gpu_ops.stablehlo")
except Exception as error:
    print("gpu_ops_" in str(error), "aquant_jax" in sys.modules)
import gpu_ops
print(np.array_equal(plain, run("network_gpu_ops.stablehlo")))
""")


@pytest.mark.parametrize("name", export.FORMATS)
def test_every_format_reproduces_all_predictions(argv, tmp_path, capsys, name):
    assert export.main([*argv, f"--format={name}"]) == 0
    folder = tmp_path / "run" / "export" / name
    report = json.loads((folder / "report.json").read_text())
    assert report["exports"]
    for found in report["exports"].values():
        assert (found["samples"], found["same"]) == (500, 500)
        assert found["difference"] < 1e-4
    size = sum(n for path, n in archive.sizes(folder).items() if path != "report.json")
    assert sum(report["bytes"].values()) == size
    assert "500 of 500 samples the same" in capsys.readouterr().out
    if name == "stablehlo":
        done = run_stablehlo(folder)
        assert done.stdout == "True False\nTrue\n", done.stderr


def test_an_export_that_is_another_network_is_not_kept(argv, tmp_path, capsys, monkeypatch):
    model = SimpleNamespace(SerializeToString=lambda: b"")
    monkeypatch.setattr(onnx_export, "to_onnx", lambda *_: model)
    monkeypatch.setattr(onnx_runtimes, "load", lambda *_: lambda x: [np.eye(10)[[0] * len(x)]])
    assert export.main([*argv, "--format=onnx"]) == 2
    assert "network.onnx is not the network: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize("classes", [10, 0], ids=["classes", "outputs"])
def test_one_sample_in_a_hundred_may_differ(classes):
    outputs = np.eye(10, dtype=np.float32)[np.arange(500) % 10]
    batch = data.Split(outputs, np.zeros(500, np.int32))
    refused = pytest.raises(InputError, match="x is not the network: 6 of 500 samples differ")
    for differing, outcome in ((5, contextlib.nullcontext()), (6, refused)):
        other = np.where(np.arange(500)[:, None] < differing, outputs[:, ::-1], outputs)
        runs = (lambda x: x), (lambda x, other=other: other)
        with outcome:
            export._check("x", export.compare(*runs, iter([batch]), classes))


def test_wrong_folders_are_one_line(argv, tmp_path, capsys):
    identity = tmp_path / "run" / "run.json"
    run = json.loads(identity.read_text())
    del run["config"]["weights"]
    identity.write_text(json.dumps(run))
    assert export.main([*argv, "--format=onnx"]) == 2
    assert f"{identity} is damaged: it lacks the config" in capsys.readouterr().err
    (tmp_path / "run" / "results.json").unlink()
    assert export.main([*argv, "--format=onnx"]) == 2
    assert "holds no finished run: there is no results.json" in capsys.readouterr().err
    assert export.main([*argv, "--format=tflite"]) == 2
    assert "tflite" in capsys.readouterr().err


def test_a_damaged_network_is_named(argv, tmp_path, capsys):
    program = tmp_path / "run" / "quantized" / "program.stablehlo.z"
    program.write_bytes(program.read_bytes()[:-1])
    assert export.main([*argv, "--format=onnx"]) == 2
    assert f"{program} is damaged" in capsys.readouterr().err
    assert not (tmp_path / "run" / "export").exists()
