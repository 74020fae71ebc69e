"""``launch.bench.backends``: the compared ways give the same codes."""

import json

from launch.bench import backends


def test_the_ways_to_make_columns_agree(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(backends, "SHAPE", (2, 6, 5, 4))
    monkeypatch.setattr(backends, "CONFIGS", ())
    out = tmp_path / "backends.json"
    assert backends.main(["backends", "--rounds=2", f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert found == json.loads(capsys.readouterr().out)
    shares = found["columns"]["share_of_equal_codes"]
    # Codes may differ within rounding of an integer; 2,160 of them seldom do.
    assert set(shares) == {"gpu_ops", "rows", "slices", "patches"}
    assert min(shares.values()) > 0.998
