"""``launch.bench deploy``: what it compares does the same thing."""

import json

import pytest

from launch.bench import calibrate, deploy

pytestmark = pytest.mark.user_model


def test_the_ways_to_make_columns_agree(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(deploy, "SHAPE", (2, 6, 5, 4))
    monkeypatch.setattr(deploy, "CONFIGS", ())
    out = tmp_path / "deploy.json"
    assert calibrate.main(["bench", "deploy", "--rounds=2", f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert found == json.loads(capsys.readouterr().out)
    shares = found["columns"]["share_of_equal_codes"]
    # Codes may differ within rounding of an integer; 2,160 of them seldom do.
    assert set(shares) == {"gpu_ops", "rows", "slices", "patches"}
    assert min(shares.values()) > 0.998


def test_an_unknown_benchmark_lists_what_there_is(capsys):
    assert calibrate.main(["bench", "speed"]) == 2
    assert "unknown benchmark 'speed'; there are: calibrate, throughput, deploy, latency, size" in (
        capsys.readouterr().err
    )
