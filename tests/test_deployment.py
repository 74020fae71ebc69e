"""``launch.bench deploy``: what it compares does the same thing."""

import json

import pytest

from launch import bench, deployment

pytestmark = pytest.mark.user_model


def test_the_ways_to_make_columns_agree(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(deployment, "SHAPE", (2, 6, 5, 4))
    monkeypatch.setattr(deployment, "CONFIGS", ())
    out = tmp_path / "deploy.json"
    assert bench.main(["bench", "deploy", "--rounds=2", f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert found == json.loads(capsys.readouterr().out)
    shares = found["columns"]["share_of_equal_codes"]
    # Codes may differ within rounding of an integer; 2,160 of them seldom do.
    assert set(shares) == {"gpu_ops", "rows", "slices", "patches"}
    assert min(shares.values()) > 0.998


def test_an_unknown_benchmark_lists_what_there_is(capsys):
    assert bench.main(["bench", "speed"]) == 2
    assert "unknown benchmark 'speed'; there are: calibrate, throughput, deploy, latency, size" in (
        capsys.readouterr().err
    )
