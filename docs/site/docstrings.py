"""Docstrings as the reference shows them: examples as code, public names as links, defaults."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import griffe

DOCS = Path(__file__).resolve().parents[1]
_DIRECTIVE = re.compile(r"^::: (\S+)\n    options:\n      heading: (\S+)", re.MULTILINE)
_EXAMPLE = re.compile(r"(?:^|\n\n)((?:>>> .*)(?:\n.+)*)")
_FLAG = re.compile(r" *# doctest: \+\w+")
_NAME = re.compile(r"(?<!`)`(\w+)`(?!`)")
_SECTION = re.compile(r"^(Args|Attributes):\n((?:(?: +.*)?\n?)+)", re.MULTILINE)
_ENTRY = re.compile(r"^( +)(\w+(?:, \w+)*): ", re.MULTILINE)


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
        defaults = _defaults(obj)
        parts = re.split(_EXAMPLE, obj.docstring.value)
        for i, part in enumerate(parts):
            if i % 2:
                parts[i] = f"\n\n```pycon\n{_FLAG.sub('', part)}\n```"
            else:
                part = _SECTION.sub(lambda found: _section(found, defaults), part)
                parts[i] = _NAME.sub(lambda found: self._link(found, obj.path), part)
        obj.docstring.value = "".join(parts).lstrip("\n")

    def _link(self, found: re.Match[str], own: str) -> str:
        path = self.paths.get(found[1])
        return f"[`{found[1]}`][{path}]" if path and path != own else found[0]


def _defaults(obj: griffe.Object) -> dict[str, str]:
    """The default of every field of a class that has one."""
    if not obj.is_class:
        return {}
    found = {name: getattr(member, "value", None) for name, member in obj.members.items()}
    return {name: str(v) for name, v in found.items() if v is not None and "(" not in str(v)[1:]}


def _section(found: re.Match[str], defaults: Mapping[str, str]) -> str:
    """A section with an entry for each name, where a docstring describes several at once."""
    return f"{found[1]}:\n" + "".join(_apart(found[2], defaults))


def _apart(text: str, defaults: Mapping[str, str]) -> Iterator[str]:
    indent = next((match[1] for match in _ENTRY.finditer(text)), "")
    starts = [match for match in _ENTRY.finditer(text) if match[1] == indent]
    ends = [match.start() for match in starts[1:]] + [len(text)]
    yield text[: starts[0].start()] if starts else text
    for match, end in zip(starts, ends, strict=True):
        first, *others = match[2].split(", ")
        said = text[match.end() : end].rstrip()
        same = said if said.startswith("see ") else f"see ``{first}``."
        for name, words in ((first, said), *((name, same) for name in others)):
            default = f" Default: ``{defaults[name]}``." if name in defaults else ""
            stop = "" if words.endswith(".") else "."
            yield f"{indent}{name}: {words}{stop}{default}\n"
    yield text[len(text.rstrip()) :]
