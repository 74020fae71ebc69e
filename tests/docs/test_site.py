"""The site: it builds without a warning, has what a reader looks for, and needs no network."""

import ast
import dataclasses
import html.parser
import logging
import re
import runpy
import sys
import warnings
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

import aquant_jax as aq
from aquant_jax import models, recipe
from configs import variants
from tests.support.process import REPOSITORY, made_once
from tests.support.project import ADDRESS

pytestmark = pytest.mark.skipif(
    find_spec("mkdocs") is None, reason="needs mkdocs (aquant-jax[docs])"
)
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src"}
NOT_FETCHED = {"canonical", "prev", "next", "edit"}  # kinds of <link>


def build(**settings):
    """Builds the site by mkdocs.yml and gives the warnings; MkDocs aborts after them."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    logger, records = logging.getLogger("mkdocs"), []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages
            config = load_config(str(REPOSITORY / "mkdocs.yml"), **settings)
            config.plugins.on_startup(command="build", dirty=False)
            build(config)
    except Abort:
        assert records
    finally:
        logger.removeHandler(handler)
    return records


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""

    def make(folder):
        assert build(site_dir=str(folder)) == []

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.chdir(REPOSITORY)
        return made_once(tmp_path_factory, "site", make)


class Page(html.parser.HTMLParser):
    """The addresses that a browser fetches to show a page, and the ids on it."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.ids = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids.append(attributes.get("id"))
        address = attributes.get(FETCHED.get(tag, ""))
        if address and not set(attributes.get("rel", "").split()) & NOT_FETCHED:
            self.fetched.append(address)


def pages(site):
    return {path.parent.relative_to(site): path.read_text() for path in site.rglob("index.html")}


def test_no_page_needs_a_network(site):
    found = {str(name): Page(text).fetched for name, text in pages(site).items()}
    assert any(found.values())
    outside = {
        name: [address for address in fetched if re.match(r"(https?:)?//", address)]
        for name, fetched in found.items()
    }
    assert {name: addresses for name, addresses in outside.items() if addresses} == {}
    assert all('data-md-component="source"' not in text for text in pages(site).values())


def test_every_page_of_the_documentation_is_on_the_site(site):
    written = {
        page.relative_to(REPOSITORY / "docs").with_suffix("")
        for page in (REPOSITORY / "docs").rglob("*.md")
        if "measurements" not in page.parts
    }
    expected = {p.parent if p.name == "index" else p for p in written}
    assert expected <= set(pages(site))


def test_every_public_name_has_an_entry_with_an_example(site):
    heading = re.compile(r'class="doc doc-heading">\s*<code[^>]*></code>\s*aq\.(\w+)\s')
    pages = (site / "reference").glob("*/index.html")
    entries = {name for page in pages for name in heading.findall(page.read_text())}
    assert set(aq.__all__) - entries == set()
    without = [name for name in aq.__all__ if ">>> " not in (getattr(aq, name).__doc__ or "")]
    assert without == []


def test_examples_are_shown_as_code_and_names_as_links(site):
    text = (site / "reference" / "quantized" / "index.html").read_text()
    assert re.search(r'class="gp">&gt;&gt;&gt; ', text)
    assert re.search(r'href="\.\./quantize/#aquant_jax\.quantize\.quantize"', text)


def test_every_field_of_a_reconstruction_has_an_entry_with_its_default(site):
    text = (site / "reference" / "recipes" / "index.html").read_text()
    for field in dataclasses.fields(aq.Reconstruction):
        name = f"aquant_jax.recipe_reconstruction.Reconstruction.{field.name}"
        found = re.search(rf'title="{name}">.*?Default: <code>(.*?)</code>', text, re.DOTALL)
        assert ast.literal_eval(found[1].replace("&#39;", "'")) == field.default


def test_programs_and_their_flags_are_listed(site):
    text = (site / "reference" / "programs" / "index.html").read_text()
    for path in (REPOSITORY / "launch").glob("*.py"):
        if "def main(" in path.read_text():
            assert f'id="launch{path.stem}"' in text, path.stem
    for flag in ("--restart_from_block", "--executor", "--budget", "--memory_limit"):
        assert f"<code>{flag}</code>" in text
    assert sys.executable not in text
    assert (
        text.index('id="launchquantize"')
        < text.index('id="launchbench')
        < text.index('id="launchrelease"')
    )


def test_every_config_is_listed_with_its_fields(site):
    text = (site / "reference" / "configs" / "index.html").read_text()
    assert 'id="cifar10_resnet20"' in text
    assert 'id="variants"' not in text
    assert "<code>--config.calibration_size</code>" in text


def test_presets_variants_and_networks_are_listed_as_the_code_has_them(site):
    def shown(page):
        return (site / "reference" / page / "index.html").read_text()

    row = re.search(r"<code>quant_drop_prob</code></td>(.*?)</tr>", shown("recipes"), re.DOTALL)[1]
    drops = [aq.recipes.preset(name).reconstruction.quant_drop_prob for name in recipe.PRESETS]
    assert re.findall(r"<td>(.*?)</td>", row) == list(map(str, drops))
    of_digits = shown("configs").partition('id="digits"')[2].partition("<h2")[0]
    for bits in variants.BIT_WIDTHS:
        assert f"<code>{bits}</code>" in of_digits
    assert "<code>preset=</code>" in of_digits
    for name in models.MODELS:
        assert f"<code>{name}</code>" in shown("models")


def test_equations_are_drawn_without_a_script(site):
    text = (site / "explanation" / "method" / "index.html").read_text()
    assert text.count("<math ") > 10
    assert "<mfrac>" in text
    assert "arithmatex" not in text


def test_links_to_files_outside_the_site_lead_to_the_repository(site):
    text = (site / "explanation" / "graph" / "index.html").read_text()
    assert f"{ADDRESS}/blob/main/aquant_jax/graph/trace.py" in text
    for path, page in pages(site).items():
        for target in re.findall(r"aquant-jax/blob/main/([^\"#]+)", page):
            assert (REPOSITORY / target).exists(), f"{path} links to {target}"


BROKEN = {
    "[a](lost.md)": "Doc file 'page.md' contains a link 'lost.md', but the target is not found",
    "[a](../lost.py)": "'page.md' contains a link '../lost.py'",
    "[a](#lost)": "Doc file 'page.md' contains a link '#lost', but there is no such anchor",
    "![a](lost.png)": "'page.md' contains a link 'lost.png'",
}


def test_a_notebook_is_a_page_with_its_outputs(tmp_path, site):
    import nbformat
    from nbformat import v4

    cells = [
        v4.new_markdown_cell("# Title\n\n[![Open in Colab](https://colab.x/a.svg)](https://y)"),
        v4.new_code_cell(
            "\n".join(f"line_{i} = {i}" for i in range(99)),
            outputs=[v4.new_output("stream", text="the machine")],
        ),
        v4.new_code_cell(
            "show()",
            outputs=[
                v4.new_output("stream", text="\x1b[1mbold\x1b[0m"),
                v4.new_output("display_data", {"image/png": "aGVsbG8="}),
            ],
        ),
    ]
    nbformat.write(v4.new_notebook(cells=cells), tmp_path / "x.ipynb")
    pages = runpy.run_path(str(REPOSITORY / "docs" / "site" / "notebook_pages.py"))
    markdown, figures = pages["converted"](tmp_path / "x.ipynb")
    assert "[Open in Colab](https://y)" in markdown
    assert "    bold\n" in markdown
    assert '??? abstract "Set-up cell"\n\n    ```python\n    line_0 = 0\n' in markdown
    assert re.search(r"\n    ```\s+It prints:\s+    the machine\n", markdown)
    assert markdown.count("line_98 = 98") == 1
    ((name, content),) = figures.items()
    assert f"]({name})" in markdown
    assert content == b"hello"
    for notebook in (REPOSITORY / "notebooks").glob("*.ipynb"):
        assert (site / "notebooks" / notebook.stem / "index.html").exists()


def test_broken_links_fail_with_the_name_of_the_page(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("# Page\n\n" + "\n\n".join(BROKEN))
    (tmp_path / "docs" / "forgotten.md").write_text("# Forgotten\n")
    found = build(
        docs_dir=str(tmp_path / "docs"), site_dir=str(tmp_path / "site"), extra_css=[],
        nav=[{"Page": "page.md"}, {"Gone": "gone.md"}], plugins=[], theme="mkdocs", watch=[],
    )  # fmt: skip
    for expected in (*BROKEN.values(), "gone.md", "forgotten.md"):
        assert any(expected in warning for warning in found), (expected, found)


def test_an_equation_that_cannot_be_read_names_its_page():
    from mkdocs.config import load_config
    from mkdocs.exceptions import PluginError

    config = load_config(str(REPOSITORY / "mkdocs.yml"))
    hooks = config.plugins["docs/site/hooks.py"]
    page = SimpleNamespace(file=SimpleNamespace(src_uri="explanation/method.md"))
    for latex in (r"\frac12 \unknown", r"x^"):
        with pytest.raises(PluginError, match=r"explanation/method\.md: equation"):
            hooks.on_page_content(rf'<span class="arithmatex">\({latex}\)</span>', page)
