"""Docstrings as the reference shows them: examples as code, public names as links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

DOCS = Path(__file__).resolve().parents[1]
_DIRECTIVE = re.compile(r"^::: (\S+)\n    options:\n      heading: (\S+)", re.MULTILINE)
_EXAMPLE = re.compile(r"(?:^|\n\n)((?:>>> .*)(?:\n.+)*)")
_NAME = re.compile(r"(?<!`)`(\w+)`(?!`)")


def entries() -> dict[str, str]:
    """The names that the reference has an entry for, such as ``aq.quantize``, and their paths."""
    pages = sorted((DOCS / "reference").glob("*.md"))
    return {head: path for page in pages for path, head in _DIRECTIVE.findall(page.read_text())}


class Docstrings(griffe.Extension):
    """Changes every docstring when it is read."""

    def __init__(self) -> None:
        """Finds the entries once."""
        self.paths = {head.rpartition(".")[2]: path for head, path in entries().items()}

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Writes its docstring anew."""
        if obj.docstring is None:
            return
        parts = re.split(_EXAMPLE, obj.docstring.value)
        for i, part in enumerate(parts):
            if i % 2:
                parts[i] = f"\n\n```pycon\n{part}\n```"
            else:
                parts[i] = _NAME.sub(lambda match: self._link(match, obj.path), part)
        obj.docstring.value = "".join(parts).lstrip("\n")

    def _link(self, match: re.Match[str], own: str) -> str:
        path = self.paths.get(match[1])
        return f"[`{match[1]}`][{path}]" if path and path != own else match[0]
