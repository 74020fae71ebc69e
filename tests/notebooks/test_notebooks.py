"""The notebooks: each runs in a kernel, shortened by its parameters; what is in git is whole."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import types

import nbformat
import pytest

from notebooks import execute
from tests.support.project import ADDRESS

# Parameters that make it short, packages that it needs, what its cells then print.
SHORT = {
    "bert_glue": (
        {"STEPS": 0, "METHODS": ["aquant_bert"]},
        ["tokenizers"],
        r"stand in for BERT.*float: (?:9\d|100)\.\d\d%.*aquant_bert +\d+\.\d\d%",
    ),
    "deploy": (
        {
            "STEPS": 0,
            "SAMPLES": 128,
            "TIMED_MODEL": "digits_cnn",
            "SIZE": 8,
            "BATCH": 4,
            "ROUNDS": 2,
        },
        ["jax2onnx", "onnxruntime"],
        r"int8 backend +\d+ of 500 .*ONNX in onnxruntime.*StableHLO.*int8 backend +\d",
    ),
    "gpu_kernel": (
        {"CPU_MODEL": "resnet20_cifar", "CPU_SIZE": 8, "CPU_BATCH": 1, "CPU_ROUNDS": 1, "STEPS": 0},
        ["matplotlib"],
        r"skipped: JAX finds no NVIDIA GPU.*border fp32 over im2col",
    ),
    "quickstart": (
        {"STEPS": 2, "SAMPLES": 128, "PRESETS": ["nearest", "aquant"]},
        ["matplotlib"],
        r"float: 99\.60%.*nearest +\d.*aquant +\d.*all 500 outputs are equal bit for bit",
    ),
    "your_model": (
        {"EPOCHS": 12, "STEPS": 0, "SAMPLES": 128, "CHOICES": [2, 4]},
        ["matplotlib", "keras"],
        r"4 of 4 weighted ops quantized.*Keras +float.*Conv_7.*predicted degradation.*report\.html",
    ),
}
SAME = "# The rest of this cell is the same in all notebooks."
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    f"({ADDRESS.replace('https://github.com', 'https://colab.research.google.com/github')}"
    "/blob/main/notebooks/{}.ipynb)"
)
MOST_BYTES = 200_000


def test_every_notebook_is_tested():
    assert sorted(SHORT) == execute.NAMES
    with pytest.raises(SystemExit, match="there is no notebook 'nothing'; there are bert_glue"):
        execute.main(["nothing"])


@pytest.mark.slow  # each of their steps has tests of its own
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", sorted(SHORT))
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    parameters, packages, expected = SHORT[name]
    for package in packages:
        if not importlib.util.find_spec(package):  # keras must not be imported without its backend
            pytest.skip(f"needs {package}")
    monkeypatch.setenv("AQUANT_DATA_DIR", str(tmp_path))  # without data, on every machine
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = execute.read(name)
    tagged = notebook.cells[execute.parameters_cell(notebook)].source
    assert all(re.search(rf"\b{key}\b", tagged) for key in parameters)
    printed = execute.text(execute.execute(notebook, tmp_path, parameters))
    assert re.search(expected, printed, re.DOTALL), printed


@pytest.fixture(params=sorted(SHORT))
def notebook(request):
    return request.param, execute.read(request.param)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def setup(notebook):
    """The first cell of code: its own lines, and those that all notebooks share."""
    own, mark, shared = code(notebook)[0].source.partition(SAME)
    return own, mark + shared


def test_a_notebook_in_git_is_whole(notebook):
    """Its cells have run, without an error, and its outputs are small."""
    name, found = notebook
    nbformat.validate(found)
    outputs = [output for cell in code(found) for output in cell.outputs]
    assert [o.evalue for o in outputs if o.output_type == "error"] == []
    assert code(found)[-1].outputs
    assert re.search(r"aquant-jax .*, JAX .*, Python .*, device: \w", execute.text(found))
    assert [cell.execution_count for cell in code(found)] == [None] * len(code(found))
    assert (execute.FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES
    assert nbformat.writes(found) == nbformat.writes(execute.clean(execute.read(name)))


def test_a_notebook_begins_with_title_badge_and_setup(notebook):
    name, found = notebook
    first, second = found.cells[:2]
    titles = [c for c in found.cells if c.cell_type == "markdown" and c.source.startswith("# ")]
    assert titles == [first]
    assert BADGE.format(name) in first.source
    assert second == code(found)[0]
    assert setup(found)[1] == setup(execute.read("quickstart"))[1] != ""
    tagged = [cell for cell in found.cells if execute.PARAMETERS in cell.metadata.get("tags", [])]
    assert tagged == [code(found)[1]]


class Runtime:
    """A runtime that runs the first cell of a notebook, with packages and Python as told."""

    def __init__(self, monkeypatch):
        self.commands, self.restarts = [], []
        self.versions = {}
        real = importlib.metadata.version
        monkeypatch.setattr(importlib.metadata, "version", lambda n: self.version(n, real))
        monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
        monkeypatch.setattr(subprocess, "run", self.run)
        monkeypatch.setattr("shutil.which", lambda name: name if self.driver else None)
        self.driver, self.returncode = "", 0

    def version(self, name, real):
        found = self.versions.get(name, real)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found if isinstance(found, str) else real(name)

    def run(self, command, **options):
        self.commands.append(" ".join(command))
        return types.SimpleNamespace(returncode=self.returncode, stdout=self.driver)

    def __call__(self, name):
        """Runs the cell."""
        kernel = types.SimpleNamespace(do_shutdown=self.restarts.append)
        shell = lambda: types.SimpleNamespace(kernel=kernel)  # noqa: E731
        exec(code(execute.read(name))[0].source, {"get_ipython": shell})

    def error(self, name="quickstart"):
        """The lines that a cell that stops shows."""
        with pytest.raises(Exception, match=r"\w") as caught:
            self(name)
        return caught.value._render_traceback_()


@pytest.fixture
def runtime(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return Runtime(monkeypatch)


def test_where_all_is_installed_the_first_cell_does_nothing(runtime, capsys):
    runtime("quickstart")
    assert runtime.commands == runtime.restarts == []
    assert re.fullmatch(r"aquant-jax .*device: \w+\n", capsys.readouterr().out)


def test_what_some_cells_do_without_is_one_line(runtime, capsys):
    pytest.importorskip("jax2onnx", reason="needs aquant-jax[onnx]")
    runtime.versions["openvino"] = None
    for name, said in (
        ("deploy", r"openvino>=\d+ \(not installed\)"),
        ("gpu_kernel", "an NVIDIA GPU"),
    ):
        runtime(name)
        _, line = capsys.readouterr().out.splitlines()
        assert re.match(f"missing here: {said}; the cells that need it say so", line)


@pytest.mark.parametrize(
    ("package", "version", "said"),
    [
        ("matplotlib", None, r"needs matplotlib>=3\.9 \(not installed\)"),
        ("jax", "0.7.2", r"needs jax<0\.13,>=0\.10 \(0\.7\.2\)"),
        ("jax", "0.13.0", r"needs jax<0\.13,>=0\.10 \(0\.13\.0\)"),
    ],
)
def test_a_missing_requirement_is_one_line(runtime, package, version, said):
    runtime.versions[package] = version
    (line,) = runtime.error()
    assert re.search(
        rf"^error: this notebook {said}: pip install 'aquant-jax\[report\] @ git", line
    )
    assert runtime.commands == []


def test_an_old_python_is_one_line(runtime, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    (line,) = runtime.error()
    assert line.startswith("error: Python 3.11 or newer is needed; this is ")


@pytest.mark.parametrize(
    ("driver", "extras", "cuda"),
    [
        ("", "report", "OFF"),
        ("550.54.15\n", "report,cuda12", "ON"),
        ("580.65\n", "report,cuda", "ON"),
    ],
)
def test_colab_installs_what_its_gpu_needs_and_restarts(runtime, monkeypatch, driver, extras, cuda):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    monkeypatch.setenv("GPU_OPS_CUDA", "")
    runtime.versions["jax"], runtime.driver = "0.7.2", driver
    runtime("quickstart")
    clone, pip = runtime.commands[-2:]
    assert re.search(f"^git clone .*{ADDRESS} aquant-jax$", clone)
    assert pip.endswith(f"pip install --quiet -e ./aquant-jax[{extras}]")
    assert (os.environ["GPU_OPS_CUDA"], runtime.restarts) == (cuda, [True])
