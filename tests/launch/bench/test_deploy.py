"""``launch.bench.deploy``: our ways give the bits of the reference, whatever is timed."""

import json

import pytest

from aquant_jax import models
from launch.bench import deploy
from launch.lib import peers
from tests.support.nets import small_net


@pytest.mark.slow
@pytest.mark.parametrize(
    ("float_stem", "batch_size"), [(False, 1), (True, 2)], ids=["codes", "float stem"]
)
def test_our_ways_run(monkeypatch, tmp_path, capsys, float_stem, batch_size):
    monkeypatch.setattr(peers, "installed", list)
    monkeypatch.setattr(models, "create", lambda name, seed=0: small_net())
    out = tmp_path / "deploy.json"
    flags = [
        "--model=resnet20_cifar", "--size=8", "--rounds=1", "--peak=100",
        f"--batch_size={batch_size}", f"--float_stem={float_stem}", f"--out={out}",
    ]  # fmt: skip
    assert deploy.main(["deploy", *flags]) == 0
    found = json.loads(out.read_text())
    assert found == json.loads(capsys.readouterr().out)
    ours = {"nearest": True, "channel": True, "element": True}
    assert found["first_image_has_the_bits_of_the_reference"] == ours
    ways = {"xla float32", "xla bfloat16", *(f"ours {name}" for name in ours)}
    assert found["ms"].keys() == found["share_of_peak"].keys() == ways
    assert not found["not_run"]


def test_an_unknown_model_is_one_line(capsys):
    assert deploy.main(["deploy", "--model=resnet19"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown model 'resnet19'")
