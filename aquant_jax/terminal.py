"""What is printed: tables on a terminal, plain text elsewhere."""

from __future__ import annotations

import sys
from typing import Any


def show(value: Any) -> None:
    """Prints a value: on a terminal the table that its ``__rich__`` returns, else its text."""
    if not sys.stdout.isatty():
        print(value)
        return
    from rich.console import Console

    Console().print(value)


def show_markdown(text: str) -> None:
    """Prints Markdown: on a terminal its tables as tables, else the text itself."""
    if not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))


def table(title: str, columns: dict[str, str], rows: list[list[str]]) -> Any:
    """A table of rich.

    Args:
      title: above it.
      columns: "left" or "right" by their names.
      rows: of texts, whose brackets are no markup.
    """
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left")
    for name, justify in columns.items():
        made.add_column(name, justify=justify, overflow="fold")  # pyright: ignore[reportArgumentType]
    for row in rows:
        made.add_row(*map(Text, row))
    return made
