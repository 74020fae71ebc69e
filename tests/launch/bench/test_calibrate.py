"""``launch.bench calibrate``: its figures, with steps one by one and in a scanned loop."""

import json
import math

import pytest

from aquant_jax.reconstruction import optimize
from launch.bench import calibrate

pytestmark = pytest.mark.user_model


@pytest.mark.parametrize("scanned", [1, 2], ids=["one by one", "scanned"])
def test_steps_are_timed(monkeypatch, tmp_path, capsys, scanned):
    monkeypatch.setattr(optimize, "steps_a_call", lambda: scanned)
    for module in (optimize, calibrate):
        monkeypatch.setattr(module, "LOG_EVERY", 1)
    monkeypatch.setattr(calibrate, "_scale_search", lambda *arguments: 1.0)
    monkeypatch.setattr(calibrate, "BATCH", 2)
    monkeypatch.setattr(calibrate, "SAMPLES", 2)
    out = tmp_path / "calibrate.json"
    assert calibrate.main(["bench", "calibrate", "--rounds=1", f"--out={out}"]) == 0
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
