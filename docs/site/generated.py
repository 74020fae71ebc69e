"""Parts of pages, generated from the programs and the configs so that nothing is typed twice."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import flags
from mkdocs.exceptions import PluginError
from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parents[2]
NO_CONFIGS = ("__init__", "variants", "imagenet", "glue")  # what several configs share


def programs() -> str:
    """What each program does, its flags and an example."""
    lines: list[str] = []
    for folder in ("launch", "launch/bench"):
        for path in sorted((ROOT / folder).glob("*.py")):
            lines += _program(f"{folder.replace('/', '.')}.{path.stem}")
    return "\n".join(lines)


def _program(name: str) -> Iterator[str]:
    """The section of one program; empty for a module that is none."""
    module = _imported(name)
    if not hasattr(module, "main"):
        return
    values = flags.FlagValues()
    getattr(module, "define_flags", lambda _: None)(values)
    text, _, example = (module.__doc__ or "").partition("\nExample:")
    yield from (f"## {name}", "", *_prose(text), "")
    for flag in sorted(values, key=lambda flag: "required" not in values[flag].help):
        default = values[flag].default
        shown = "" if default in (None, "", []) else f" Default: `{_text(default)}`."
        yield f"- `--{flag}`: {_escaped(values[flag].help).rstrip('.')}.{shown}"
    if example:
        yield from ("", "```", *inspect.cleandoc(example).splitlines(), "```")
    yield ""


def configs() -> str:
    """The docstring of each config file, and the fields that flags set."""
    lines: list[str] = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem not in NO_CONFIGS:
            lines += _config(path)
    return "\n".join(lines)


def _config(path: Path) -> Iterator[str]:
    module = _imported(f"configs.{path.stem}")
    yield from (f"## {path.stem}", "")
    text = re.sub(r" {4,}(--\w)", r" \\\n    \1", (module.__doc__ or "").strip())
    yield from ("```text", *text.splitlines(), "```", "")
    yield from ("| field | default |", "| --- | --- |")
    for name, value in _fields(module.get_config()):
        yield f"| `--config.{name}` | `{_text(value)}` |"
    yield ""


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a config without those of the recipe, which have a page of their own."""
    for name, value in config.items():
        if name != "recipe" and isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")
        elif name != "recipe":
            yield prefix + name, value


def supported() -> str:
    """What README.md says of features and limits."""
    readme = (ROOT / "README.md").read_text()
    lines = []
    for title in ("What is supported", "Limits"):
        found = re.search(rf"^## {title}\n(.*?)(?=^## )", readme, re.MULTILINE | re.DOTALL)
        if found is None:
            raise PluginError(f"reference/supported.md: README.md has no section {title!r}")
        text = re.sub(r"\]\((?!https?:|#)", "](../../", found[1])  # its links start at the root
        lines += [f"## {title}", text]
    return "\n".join(lines)


def _imported(name: str) -> Any:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


def _prose(text: str) -> list[str]:
    """A docstring as Markdown: indented parts are lists or commands, which stay as they are."""
    parts = []
    for part in inspect.cleandoc(text).split("\n\n"):
        if "\n  " in f"\n{part}":
            parts += ["```text", *part.splitlines(), "```", ""]
        else:
            parts += [_escaped(part), ""]
    return parts


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, but for `` `code` ``."""
    return "`".join(
        part if i % 2 else part.replace("<", "&lt;").replace("*", r"\*").replace("_", r"\_")
        for i, part in enumerate(text.replace("``", "`").split("`"))
    )


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "~" if str(value) == str(Path.home()) else str(value)


# What a page ends in, on the site alone.
PAGES: dict[str, Callable[[], str]] = {
    "reference/programs.md": programs,
    "reference/configs.md": configs,
    "reference/supported.md": supported,
}
