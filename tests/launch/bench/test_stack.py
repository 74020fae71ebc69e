"""``launch.bench.stack``: a rolled stack has a smaller program."""

import json

import pytest

from launch.bench import stack


@pytest.mark.slow
def test_rolled_and_unrolled(monkeypatch, tmp_path, capsys):
    for name, value in {"LAYERS": (5,), "WIDTH": 8, "POSITIONS": 4, "BATCH": 4}.items():
        monkeypatch.setattr(stack, name, value)
    out = tmp_path / "stack.json"
    assert stack.main(["stack", "--rounds=1", f"--out={out}"]) == 0
    rolled, unrolled = json.loads(out.read_text())["rows"]
    assert (rolled["form"], unrolled["form"]) == ("rolled", "unrolled")
    assert rolled["program"] < 0.9 * unrolled["program"]
    for name in ("reference", "int8"):
        assert set(rolled[name]) == {"lower", "compile", "ms"}
