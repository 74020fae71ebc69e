"""Executes the notebooks of this folder and writes their outputs into them.

    python notebooks/execute.py              # all of them
    python notebooks/execute.py quickstart

Paths that a notebook writes to are in a temporary folder. Widgets, times and counts of cells are
left out, so that two runs differ in nothing but what they computed.
"""

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbclient
import nbformat

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
PARAMETERS = "parameters"  # tag of the cell whose values `execute` replaces, as in papermill
TIMEOUT = 3600  # seconds a cell
START = 600  # seconds that a kernel may take to start, on a busy machine


def read(name: str) -> Any:
    """A notebook of this folder."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(
    notebook: Any, folder: str | Path, parameters: Mapping[str, Any] | None = None, **options: Any
) -> Any:
    """Runs a notebook.

    Args:
        notebook: it gets the outputs.
        folder: where its kernel runs.
        parameters: values of the cell `PARAMETERS` to replace.
        **options: of `nbclient.NotebookClient`.

    Returns:
        The notebook.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell has failed.
    """
    if parameters:
        lines = [f"{name} = {value!r}" for name, value in parameters.items()]
        cell = nbformat.v4.new_code_cell("\n".join(lines))
        notebook.cells.insert(parameters_cell(notebook) + 1, cell)
    resources = {"metadata": {"path": str(folder)}}
    options = {"timeout": TIMEOUT, "startup_timeout": START, "resources": resources} | options
    return nbclient.NotebookClient(notebook, **options).execute()


def parameters_cell(notebook: Any) -> int:
    """The index of the cell that is tagged `PARAMETERS`."""
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    return next(index for index, found in enumerate(tags) if PARAMETERS in found)


def clean(notebook: Any) -> Any:
    """The notebook without what differs from run to run, or that no reader needs."""
    notebook.metadata.language_info = {"name": "python"}  # not its version
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = list(_outputs(cell.outputs))
    return notebook


def _outputs(outputs: list[Any]) -> Iterator[Any]:
    for output in outputs:
        if "execution_count" in output:
            output.execution_count = None
        if "metadata" in output:
            output.metadata = nbformat.from_dict({})
        if "image/png" in output.get("data", {}):
            output.data.pop("text/plain", None)  # an address in memory
        yield output


def text(notebook: Any) -> str:
    """All that its cells have printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def main(names: list[str]) -> None:
    """Executes notebooks by name, all of them if there is none."""
    if unknown := sorted({*names} - {*NAMES}):
        sys.exit(f"error: there is no notebook {unknown[0]!r}; there are {', '.join(NAMES)}")
    for name in names or NAMES:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = clean(execute(read(name), folder))
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        print(f"{name}: {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
