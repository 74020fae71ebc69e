"""``launch.bench.latency`` on a small network: its layers, its ways, and its files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpu_ops
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.conv_geometry import ConvGeometry
from launch.bench import latency

WORK = latency.Workload("resnet20_cifar", 16, 2, 1, "element")


def test_layers_are_those_of_the_network():
    found = latency.convolutions(WORK)
    assert len(found) == 20
    first, head = found["params/conv1/kernel"], found["params/linear/kernel"]
    assert first[:2] == ((2, 16, 16, 3), (3, 3, 3, 16))
    assert first.geometry == ConvGeometry((16, 16), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    assert head == ((2, 1, 1, 64), (1, 1, 64, 10), ConvGeometry.pointwise(1))
    strided = [c for c in found.values() if c.geometry.strides == (2, 2)]
    assert [c.x[-1] for c in strided] == [16, 32]


@pytest.mark.parametrize("groups", [1, 2, 8], ids=["dense", "grouped", "depthwise"])
def test_all_ways_convolve(groups):
    geometry = ConvGeometry((6, 5), (3, 3), (2, 1), (1, 1), ((1, 0), (1, 1)), groups)
    at = latency.Layer((2, 6, 5, 8), (3, 3, 8 // groups, 8), geometry)
    x = jax.random.normal(jax.random.key(1), at.x)
    ways = latency.ways(at, "element")
    found = {name: way.run(x.astype(way.dtype), *way.operands) for name, way in ways.items()}
    shapes = {name: y.shape for name, y in found.items()}
    assert set(shapes.values()) == {(2, 3, 5, 8)}
    np.testing.assert_allclose(found["im2col fp32"], found["xla fp32"], rtol=1e-4, atol=1e-4)
    assert found["xla bf16"].dtype == jnp.bfloat16
    # Of the two ways to round the activations to 4 bits, each is far from the other and from float.
    assert np.abs(found["border fp32"] - found["im2col fp32"]).max() > 0.1
    assert np.abs(found["border int8"] - found["nearest int8"]).max() > 0.1
    assert np.abs(found["channel int8"] - found["nearest int8"]).max() > 0.1


def test_the_launcher_writes_json_table_and_plot(tmp_path, capsys, monkeypatch):
    few = dict(list(latency.convolutions(WORK).items())[:3])
    monkeypatch.setattr(latency, "convolutions", lambda work: few)
    monkeypatch.setattr(latency, "CACHE", 1)
    out = tmp_path / "latency.json"
    assert latency.main(["latency", "--rounds=3", f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert [len(layer["layers"]) for layer in found["layers"]] == [1, 2]
    for way, total in found["total_ms"].items():
        one, two = (layer["ms"][way]["median"] for layer in found["layers"])
        assert total == pytest.approx(one + 2 * two)
    assert out.with_suffix(".md").read_text() == latency.table(found) + "\n"
    assert out.with_suffix(".png").stat().st_size > 1000


def test_an_unknown_model_is_named(capsys):
    assert latency.main(["latency", "--model=resnet19"]) == 2
    assert "resnet19" in capsys.readouterr().err


@pytest.mark.parametrize(("channels", "served"), [(32, True), (24, False)])
def test_layers_that_the_tuned_kernel_does_not_serve_run_in_int8(channels, served):
    geometry = ConvGeometry((6, 5), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    at = latency.Layer((2, 6, 5, channels), (3, 3, channels, 64), geometry)
    way = latency.ways(at, "element")["border int8"]
    tuned = latency.tuned(at, Rounding(latency.BITS, "quadratic"), way)
    assert isinstance(tuned.operands[0], gpu_ops.TunedConvolution) == served
    assert tuned.dtype == jnp.bfloat16
    if not served:
        x = jax.random.normal(jax.random.key(1), at.x)
        np.testing.assert_array_equal(
            tuned.run(x, *tuned.operands), way.run(x, *way.operands).astype(jnp.bfloat16)
        )
