"""``launch.bench calibrate``: its figures, with steps one by one and in a scanned loop."""

import json
import math

import pytest

from aquant_jax import reconstruct
from launch import bench

pytestmark = pytest.mark.user_model


@pytest.mark.parametrize("scanned", [1, 2], ids=["one by one", "scanned"])
def test_steps_are_timed(monkeypatch, tmp_path, capsys, scanned):
    monkeypatch.setattr(reconstruct, "steps_a_call", lambda: scanned)
    for module in (reconstruct, bench):
        monkeypatch.setattr(module, "LOG_EVERY", 1)
    monkeypatch.setattr(bench, "_scale_search", lambda *arguments: 1.0)
    monkeypatch.setattr(bench, "BATCH", 2)
    monkeypatch.setattr(bench, "SAMPLES", 2)
    out = tmp_path / "calibrate.json"
    assert bench.main(["bench", "calibrate", "--rounds=1", f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert set(found["step_ms"]) == {"float", "qdrop", "aquant", "aquant_without_gpu_ops"}
    for value in (
        *found["step_ms"].values(),
        found["qdrop_over_float"],
        found["aquant_over_qdrop"],
    ):
        assert math.isfinite(value)
        assert value > 0
    assert found["block"].startswith("params/layer1_0")
