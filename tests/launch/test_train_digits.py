"""``launch.train_digits``."""

from launch import train_digits
from tests.launch.conftest import OPTAX


@OPTAX
def test_it_writes_a_checkpoint_that_the_zoo_reads(tmp_path, capsys):
    output = tmp_path / "digits.safetensors"
    assert train_digits.main(["train_digits", f"--output={output}", "--epochs=2"]) == 0
    score = float(capsys.readouterr().out.split("held-out: ")[1].split("%")[0])
    assert score > 60


def test_a_folder_that_is_missing_is_one_line(tmp_path, capsys):
    output = tmp_path / "none" / "x.safetensors"
    assert train_digits.main(["train_digits", f"--output={output}"]) == 2
    assert f"{output} cannot be written: {output.parent} is not a folder" in capsys.readouterr().err
    assert train_digits.main(["train_digits", f"--output={tmp_path}"]) == 2
    assert f"{tmp_path} cannot be written: it is a folder" in capsys.readouterr().err


def test_it_says_that_it_trains_the_digits_network_and_no_other():
    assert train_digits.__doc__.startswith("Trains the float digits network of the demo, and no")
