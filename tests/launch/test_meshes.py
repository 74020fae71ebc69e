"""The value of ``--mesh``."""

import json

import jax
import pytest

from aquant_jax.errors import InputError
from launch.lib import meshes
from tests.support.process import run_python


@pytest.mark.parametrize("text", [None, "1", "auto"])
def test_one_device_needs_no_mesh(text):
    assert jax.local_device_count() == 1
    assert meshes.parse(text) is None


@pytest.mark.parametrize("text", ["0", "-1", "2x", "x2", "all", "2x0", "", "1.5"])
def test_what_is_no_mesh_is_an_error(text):
    with pytest.raises(InputError, match=f"--mesh={text}: it must be a number, auto, or NxM"):
        meshes.parse(text)


@pytest.mark.parametrize(("text", "needed"), [("4", 4), ("2x3", 6)])
def test_more_devices_than_there_are_is_an_error(text, needed):
    with pytest.raises(InputError, match=f"--mesh={text} needs {needed} devices, and JAX has 1 "):
        meshes.parse(text)


PROGRAM = """
import json
from launch import quantize
for mesh in ("2", "3"):
    command = ["quantize", "--config=configs/digits.py:w4a4,preset=nearest", f"--mesh={mesh}",
               f"--workdir=FOLDER/{mesh}"]
    print(mesh, quantize.main(command))
    try:
        results = json.load(open(f"FOLDER/{mesh}/results.json"))
        print(json.dumps([results["blocks"][0]["devices"], results["quantized"]["top1"]]))
    except FileNotFoundError:
        pass
"""


@pytest.mark.slow
def test_a_run_on_two_devices(tmp_path):
    """Scores 500 images in batches of 250; 3 devices do not divide its batches of 32."""
    program = PROGRAM.replace("FOLDER", str(tmp_path))
    process = run_python(program, JAX_NUM_CPU_DEVICES="4")
    lines = process.stdout.splitlines()
    assert "2 0" in lines, process.stderr[-2000:]
    devices, top1 = json.loads(lines[lines.index("2 0") + 1])
    assert devices == 2
    assert top1 > 90
    assert lines[-1] != "3 0"
    expected = "error: mesh: a batch of 32 samples cannot be split evenly over 3 devices"
    assert expected in process.stderr
