"""``launch.bench.memory``: both cases are measured, and end with the same bits."""

import json

import pytest

from launch.bench import memory
from tests.support.process import run_pools_here


@pytest.mark.slow
def test_with_and_without_a_limit(monkeypatch, tmp_path, capsys):
    run_pools_here(monkeypatch, memory)
    out = tmp_path / "memory.json"
    flags = ["--model=digits_cnn", "--size=8", "--samples=8", "--batch_size=4", f"--out={out}"]
    monkeypatch.setattr(memory, "CHANNELS", 1)
    assert memory.main(["memory", *flags, "--memory_limit=100GiB"]) == 0
    report = json.loads(out.read_text())
    limited, free = report["rows"]
    assert (limited["limit"], free["limit"]) == (100 * 2**30, None)
    assert report["same"]
    assert limited["peak"] > 2**20


def test_images_that_do_not_fit_on_the_disk_are_an_error_of_one_line(capsys):
    assert memory.main(["memory", "--model=digits_cnn", f"--samples={10**21}"]) == 2
    assert "--samples=1000000000000000000000 --size=224: the images take" in capsys.readouterr().err
