"""``launch.bench.memory``: both cases are measured, and end with the same bits."""

import json

from launch.bench import memory


def test_with_and_without_a_limit(monkeypatch, tmp_path, capsys):
    class InThisProcess:
        def __init__(self, workers):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def apply(self, function, arguments):
            return function(*arguments)

    monkeypatch.setattr(
        memory.multiprocessing, "get_context", lambda kind: type("", (), {"Pool": InThisProcess})
    )
    out = tmp_path / "memory.json"
    flags = ["--model=digits_cnn", "--size=8", "--samples=8", "--batch_size=4", f"--out={out}"]
    monkeypatch.setattr(memory, "CHANNELS", 1)
    assert memory.main(["memory", *flags, "--memory_limit=100GiB"]) == 0
    report = json.loads(out.read_text())
    limited, free = report["rows"]
    assert (limited["limit"], free["limit"]) == (100 * 2**30, None)
    assert report["same"]
    assert limited["peak"] > 2**20
