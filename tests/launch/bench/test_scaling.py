"""``launch.bench.scaling`` and ``scaling_model``: what is measured is what the model is held to."""

import functools
import json

import jax
import pytest

from launch.bench import scaling, scaling_model
from launch.lib import scaling_workload
from launch.lib.scaling_model import Schedule
from launch.lib.shape_networks import Decoder, decoder
from tests.support.process import run_pools_here

TINY = functools.partial(decoder, Decoder(2, 8, 12, 2, 1, 256, 4))


@jax.numpy_rank_promotion("allow")
@pytest.mark.slow
def test_measurements_and_model_meet(monkeypatch, tmp_path, capsys):
    run_pools_here(monkeypatch, scaling)
    monkeypatch.setitem(scaling_workload.TRANSFORMERS, "small_decoder", TINY)
    rates = {"elements_a_second": 1e6, "weights_a_second": 1e6}
    monkeypatch.setattr(scaling, "range_search", lambda: rates)
    out = tmp_path / "measured.json"
    flags = ["--samples=4", "--batch_size=2", "--steps=3", "--meshes=1", f"--out={out}"]
    flags += ["--model=small_decoder", "--preset=brecq", "--weights_only"]
    assert scaling.main(["scaling", *flags]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert [block["name"] for block in row["blocks"]] == ["layer_0", "layer_1", "head"]
    for block in row["blocks"]:
        assert block["step"]["flops"] > 0
        assert block["step"]["collectives"] == {}
        assert block["step"]["seconds"]["median"] > 0
        assert block["forward"]["flops"] > 0
        assert block["hand_over_seconds"] + block["rest_seconds"] > 0
    last = row["blocks"][-1]
    assert (last["write"], last["hand_over_seconds"]) == (None, 0)  # nothing reads its outputs

    like = scaling_model.Target(TINY, scaling_model.recipes.brecq(4, None), Schedule(samples=64),
                                "small_decoder")  # fmt: skip
    monkeypatch.setattr(scaling_model, "TARGETS", {"tiny": like})
    capsys.readouterr()
    assert scaling_model.main(["scaling_model", f"--measured={out}"]) == 0
    report = json.loads(capsys.readouterr().out)
    (check,) = report["checks"]
    for name in ("flops", "bytes_accessed"):
        assert check["predicted"][name] == pytest.approx(check["measured"][name], rel=0.3)
    ways = [(row["devices"], row["way"], row["mesh"]) for row in report["predictions"]]
    assert ways[:3] == [(1, "samples", "1x1"), (8, "samples", "8x1"),
                        (64, "samples and weights", "32x2")]  # fmt: skip
    assert (512, "larger batch", "64x8") in ways
    by_way = {row["way"]: row for row in report["predictions"] if row["devices"] == 64}
    assert by_way["larger batch of own samples"]["sent"] < by_way["larger batch"]["sent"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--measured is empty"),
        ("[]", "measured.json is no file of launch.bench.scaling"),
        ('{"benchmark": "size", "rows": []}', "measured.json is of size on []; it must be"),
        ('{"benchmark": "scaling", "rows": [{"mesh": "2"}]}', "of scaling on ['2']; it must be"),
    ],
)
def test_other_files_are_one_line(text, message, tmp_path, capsys):
    path = tmp_path / "measured.json"
    path.write_text(text or "")
    flags = [] if text is None else [f"--measured={path}"]
    assert scaling_model.main(["scaling_model", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
