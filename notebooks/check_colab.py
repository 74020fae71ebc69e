"""Runs notebooks as Colab does: in an environment that begins with Colab's versions.

    python3.12 notebooks/check_colab.py FOLDER quickstart deploy

FOLDER gets a virtual environment of the Python that runs this, with the versions below. The first
cell of a notebook then clones this repository (what is committed), installs it and ends its kernel;
a new kernel runs all cells. Nothing is written outside of FOLDER. Prints minutes.
"""

import contextlib
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# Of Colab at the end of 2025, as far as these notebooks meet them; TensorFlow is left out.
COLAB = (
    *("jax==0.7.2", "flax==0.10.7", "optax==0.2.6", "orbax-checkpoint==0.11.26", "numpy==2.0.2"),
    *("matplotlib==3.10.0", "keras==3.10.0", "scikit-learn==1.6.1", "tensorflow-datasets==4.9.9"),
    *("ipykernel==6.17.1", "ipython==7.34.0", "nbclient==0.10.2"),
)
INSIDE = "--inside"  # this program, run by the environment


def make(folder: Path) -> Path:
    """The interpreter of an environment with Colab's versions, which is made if there is none."""
    python = folder / "environment" / "bin" / "python"
    if not python.exists():
        venv.create(folder / "environment", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *COLAB], check=True)
    return python


def check(name: str, folder: Path) -> None:
    """Runs the first cell of a notebook, and all of it in a new kernel."""
    import execute  # as this program runs beside it, in an environment that has nbclient
    from nbclient.exceptions import DeadKernelError

    first, start = execute.read(name), time.perf_counter()
    first.cells = first.cells[:2]
    with contextlib.suppress(DeadKernelError):  # the cell ends its kernel
        execute.execute(first, folder)
    print(execute.text(first), end="")
    print(f"{name}: first cell {_minutes(start)}", flush=True)
    whole, start = execute.read(name), time.perf_counter()
    print(execute.text(execute.execute(whole, folder)), end="")
    print(f"{name}: all cells {_minutes(start)}", flush=True)


def _minutes(start: float) -> str:
    return f"{(time.perf_counter() - start) / 60:.1f} minutes"


def main(folder: str, *names: str) -> None:
    """Checks notebooks by name."""
    content = Path(folder).absolute() / "content"
    content.mkdir(parents=True, exist_ok=True)
    python = make(content.parent)
    colab = {"COLAB_RELEASE_TAG": "check", "AQUANT_SOURCE": f"file://{REPOSITORY}"}
    for name in names:
        command = [python, __file__, INSIDE, name, content]
        subprocess.run(command, env=os.environ | colab, check=True)


if __name__ == "__main__":
    if sys.argv[1] == INSIDE:
        check(sys.argv[2], Path(sys.argv[3]))
    else:
        main(*sys.argv[1:])
