"""``launch.bench.size``: what is on the disk is its bits."""

import json

import pytest

from aquant_jax import models
from launch.bench import size
from tests.support.nets import images, small_net


@pytest.mark.slow
def test_the_payload_is_within_three_percent_of_its_bits(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(models, "create", lambda name: small_net(width=32))
    monkeypatch.setattr(size, "NETWORKS", {"residual": images(0).shape[1]})
    out = tmp_path / "size.json"
    assert size.main(["size", f"--out={out}"]) == 0
    report = json.loads(out.read_text())
    rows = {(row["weight_bits"], row["border_format"]): row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 6
    for row in rows.values():
        assert row["bits"] <= row["payload"] < 1.03 * row["bits"]
        assert 0 < row["container"] < 10_000
        assert row["program"] > 1000
    two, four = (rows[bits, "float16"]["payload"] for bits in (2, 4))
    assert 1.3 < four / two < 2
    for bits in (2, 4):
        formats = (rows[bits, name]["borders"] for name in ("float32", "float16", "int8"))
        float32, float16, int8 = formats
        assert float32 == 2 * float16 == 4 * int8
    assert report["table"].count("\n") == 7
