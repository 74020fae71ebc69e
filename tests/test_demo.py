"""``python -m aquant_jax.demo``."""

import re

import pytest

from aquant_jax import demo


def test_learned_methods_beat_nearest(capsys):
    demo.main(["--presets", "nearest", "brecq", "--steps", "100"])
    scores = dict(re.findall(r"\| (\w+) \| (\d+\.\d\d) \|", capsys.readouterr().out))
    assert list(scores) == ["nearest", "brecq", "float"]
    assert scores["nearest"] == "53.60"
    assert scores["float"] == "99.60"
    assert float(scores["brecq"]) > 75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: 0 is less than 1"),
        (["--bits", "9"], "argument --bits: invalid choice: 9"),
        (["--presets", "gptq"], "argument --presets: invalid choice: 'gptq'"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        demo.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
