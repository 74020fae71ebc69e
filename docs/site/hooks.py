"""Hooks of the site: links to the repository, equations as MathML, and the generated pages.

``mkdocs.yml`` names this file; MkDocs calls the functions ``on_*``.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import generated  # its folder is on the path while MkDocs reads this file
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"(\]\()(\.{0,2}[^)\s#:]+)((?:#[^)\s]*)?\))")
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


@event_priority(100)  # before mkdocs-jupyter, which takes notebooks out of the files that it finds
def on_files(files: Files, config: Any) -> Files:
    """Adds the notebooks."""
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        name = f"tutorials/{notebook.name}"
        files.append(File.generated(config, name, abs_src_path=str(notebook)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Adds what is generated, and leads links to files of the repository to where they can be read.

    What is neither a page nor such a file stays, and MkDocs reports it with the page's name.
    """
    here = (Path(config.docs_dir) / page.file.src_uri).parent
    tree = f"{config.repo_url}/blob/main/"

    def lead(match: re.Match[str]) -> str:
        target = (here / match[2]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return match[0]
        if target.is_relative_to(config.docs_dir):
            file = files.get_file_from_path(str(target.relative_to(config.docs_dir)))
            if file is not None and file.inclusion.is_included():
                return match[0]
        return f"{match[1]}{tree}{target.relative_to(ROOT).as_posix()}{match[3]}"

    if build := generated.PAGES.get(page.file.src_uri):
        markdown = f"{markdown}\n{build()}"
    return _LINK.sub(lead, markdown)


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
        return drawn

    return _EQUATION.sub(draw, content)
