"""What ``--help`` prints."""

import textwrap
from pathlib import Path

from absl import flags

EXAMPLE = "\nExample:"  # the part of a program's docstring that --help prints last
WIDTH = 100  # of --help


def help_text(description: str, values: flags.FlagValues) -> str:
    """The text of --help: what the program does, its flags, and the example at the end."""
    text, mark, example = description.strip().partition(EXAMPLE)
    lines = [text.rstrip(), ""]
    for name in sorted(values, key=lambda name: "required" not in values[name].help):
        default = values[name].default
        shown = "" if default in (None, "", []) else f" (default {_shown(default)})"
        line = f"  --{name}: {values[name].help}{shown}"
        lines += textwrap.wrap(line, WIDTH, subsequent_indent="      ")
    return "\n".join([*lines, (mark + example).rstrip()])


def _shown(default: object) -> str:
    text = ",".join(map(str, default)) if isinstance(default, list) else str(default)
    return "~" if text == str(Path.home()) else text
