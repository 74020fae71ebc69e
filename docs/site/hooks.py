"""Hooks of the site: links to the repository, equations as MathML, and the generated pages.

``mkdocs.yml`` names this file; MkDocs calls the functions ``on_*``.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

import generated  # its folder is on the path while MkDocs reads this file
import notebook_pages
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"(\]\()(\.{0,2}[^)\s#:]+)((?:#[^)\s]*)?\))")
_PART = re.compile(r"<!-- site: (\w+) -->")
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds the notebooks."""
    for file in notebook_pages.pages(config):
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Adds what is generated, and leads links to files of the repository to where they can be read.

    What is neither a page nor such a file stays, and MkDocs reports it with the page's name.
    """
    markdown = _PART.sub(lambda found: generated.PARTS[found[1]](), markdown)
    own = PurePosixPath(page.file.src_uri).parent
    here = (ROOT if own.name == notebook_pages.FOLDER.name else Path(config.docs_dir)) / own

    def lead(match: re.Match[str]) -> str:
        target = (here / match[2]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return match[0]
        shown = files.get_file_from_path(_source(target, Path(config.docs_dir)))
        if shown is not None and shown.inclusion.is_included():
            return f"{match[1]}{posixpath.relpath(shown.src_uri, str(own))}{match[3]}"
        path = target.relative_to(ROOT).as_posix()
        return f"{match[1]}{config.repo_url}/blob/main/{path}{match[3]}"

    return _LINK.sub(lead, markdown)


def _source(target: Path, docs: Path) -> str:
    """What MkDocs calls a file of the repository, if it is part of the site."""
    if target.parent == notebook_pages.FOLDER:
        return f"notebooks/{target.stem}.md"
    return target.relative_to(docs).as_posix() if target.is_relative_to(docs) else ""


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Replaces equations by MathML, which a browser draws without a script or a network."""

    def draw(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        latex = html.unescape(match[3]).strip()
        try:
            drawn = convert(latex, display=display)
        except Exception as error:  # its errors have no common class
            problem = f"{type(error).__name__} {error}"
            raise PluginError(f"{page.file.src_uri}: equation {latex!r}: {problem}") from error
        if unknown := re.search(r"\\\w+", html.unescape(drawn)):  # shown as it is
            raise PluginError(f"{page.file.src_uri}: equation {latex!r}: unknown {unknown[0]}")
        return f'<div class="equation">{drawn}</div>' if display == "block" else drawn

    return _EQUATION.sub(draw, content)
