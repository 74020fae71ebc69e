"""Notebooks as Markdown pages, with the outputs that they have in git.

As Markdown they look like the other pages, and MkDocs checks their links.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
LONG = 60  # lines
_BADGE = re.compile(r"!\[([^]]*)\]\(https://colab[^)]*\.svg\)")  # an image from elsewhere
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def pages(config: Any) -> Files:
    """A page for each notebook, and the figures of its outputs."""
    found = Files([])
    for path in sorted(FOLDER.glob("*.ipynb")):
        markdown, figures = converted(path)
        found.append(File.generated(config, f"notebooks/{path.stem}.md", content=markdown))
        for name, content in figures.items():
            found.append(File.generated(config, f"notebooks/{name}", content=content))
    return found


def converted(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its figures by their path beside it."""
    import nbformat
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(path, as_version=4)
    notebook.cells = list(itertools.chain.from_iterable(map(_folded, notebook.cells)))
    names = {"output_files_dir": f"{path.stem}_files", "unique_key": path.stem}
    markdown, resources = MarkdownExporter().from_notebook_node(notebook, resources=names)
    return _BADGE.sub(r"\1", _COLOURS.sub("", markdown)), resources["outputs"]


def _folded(cell: Any) -> list[Any]:
    """A cell; a long one, which sets the notebook up, as a box to open before its outputs."""
    from nbformat.v4 import new_markdown_cell

    if cell.cell_type != "code" or len(cell.source.splitlines()) <= LONG:
        return [cell]
    fence = textwrap.indent(f"```python\n{cell.source}\n```", "    ")
    cell.metadata["transient"] = {"remove_source": True}  # nbconvert then shows outputs alone
    # The last line ends the box, which indented text after it would belong to.
    return [new_markdown_cell(f'??? abstract "Set-up cell"\n\n{fence}\n\nIt prints:'), cell]
