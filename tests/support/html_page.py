"""A page of HTML as what a reader finds in it."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Parses a page.

    Attributes:
        elements: (tag, attributes) in order.
        tables: rows of cell texts by the table's id, the heads first.
        text: of the page, without style and script.
        open: tags that were never closed.
    """

    VOID = ("meta", "link", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements, self.tables, self.text, self.open = [], {}, "", []
        self._table = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self._table = self.tables.setdefault(dict(attrs)["id"], [])
        if tag == "tr":
            self._table.append([])
        if tag in ("td", "th"):
            self._table[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self._table[-1][-1] += data

    def named(self, attribute):
        """The values of an attribute."""
        return [attrs[attribute] for _, attrs in self.elements if attribute in attrs]

    def count(self, tag):
        """How many elements there are of a tag."""
        return [name for name, _ in self.elements].count(tag)
