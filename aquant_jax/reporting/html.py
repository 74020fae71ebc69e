"""Elements of HTML, whose text and attributes are escaped when they are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

Child = Element | str | None


def tag(kind: str, /, *children: Child, **attributes: str) -> Element:
    """An element; a trailing underscore of an attribute's name is dropped, inner ones are dashes.

    >>> ElementTree.tostring(tag("p", "a < b", class_="note"), encoding="unicode", method="html")
    '<p class="note">a &lt; b</p>'
    """
    names = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    element = Element(kind, names)
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif child:
            last = element[-1] if len(element) else None
            if last is None:
                element.text = (element.text or "") + child
            else:
                last.tail = (last.tail or "") + child
    return element


def document(root: Element) -> str:
    """The text of a page."""
    text = ElementTree.tostring(root, encoding="unicode", method="html")
    return f"<!DOCTYPE html>\n{text}\n"


class Column(NamedTuple):
    """A column of a table.

    Attributes:
      title: of the column.
      number: whether its cells are numbers, which stand right.
      decimals: of its numbers; None shows four significant digits.
      note: what it is, in a tooltip.
    """

    title: str
    number: bool = True
    decimals: int | None = None
    note: str = ""


def table(
    name: str, columns: Sequence[Column], rows: Iterable[Sequence[Any]], label: str
) -> Element:
    """A table that its column heads sort.

    Args:
      name: its id.
      columns: of the table; the first names the row.
      rows: of numbers, texts, elements, or None where there is nothing.
      label: what it shows, for those who do not see it.
    """
    body = [tag("tr", *map(_cell, range(len(columns)), columns, row)) for row in rows]
    head = tag("thead", tag("tr", *map(_head, columns)))
    made = tag("table", head, tag("tbody", *body), id=name, aria_label=label)
    return tag("div", made, class_="scroll", tabindex="0", role="region", aria_label=label)


def _head(column: Column) -> Element:
    button = tag("button", column.title, type="button")
    if column.note:
        button.set("title", column.note)
    return tag("th", button, scope="col", **({"class": "number"} if column.number else {}))


def _cell(index: int, column: Column, value: Any) -> Element:
    attributes = {"class": "number"} if column.number else {}
    if index == 0:
        return tag("th", _child(value), scope="row")
    if column.number:
        known = isinstance(value, int | float) and math.isfinite(value)
        attributes["data-value"] = repr(value) if known else ""
        return tag("td", number(value, column.decimals) if known else "–", **attributes)
    return tag("td", _child(value) if value is not None else "–", **attributes)


def _child(value: Any) -> Child:
    return value if isinstance(value, Element) else str(value)


def number(value: float, decimals: int | None = None) -> str:
    """A number for people.

    >>> number(1234567), number(0.00012345), number(12.345678), number(3.0)
    ('1,234,567', '0.0001234', '12.35', '3')
    """
    if decimals is not None:
        return f"{value:,.{decimals}f}"
    if isinstance(value, int) or value.is_integer():
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
