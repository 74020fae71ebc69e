"""What docs/explanation/method.md says of its figures."""

import importlib.util
import json
import re

import numpy as np
import pytest

from tests.support.process import REPOSITORY

DOCS = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("method_figures", DOCS / "method_figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("element", [(1.1, 1.0, 2.0), (0.7, 1.0, 1.0), (2.4, 2.0, -1.0)])
def test_the_border_makes_both_ends_equally_bad_and_the_error_unbiased(element, figures):
    one = figures.Element(*element)
    border = one.border()
    ends = np.array([-border, 1 - border])
    assert one.error(ends[0]) ** 2 == pytest.approx(one.error(ends[1]) ** 2, abs=1e-6)
    assert one.error(np.linspace(*ends, 101)).mean() == pytest.approx(0, abs=1e-6)
    assert abs(one.error(np.linspace(-0.5, 0.5, 101)).mean()) > 0.1


@pytest.mark.parametrize(
    ("index", "name", "shown"),
    [(0, "propagated_error", "input of layer1_1"), (1, "allocation_front", "W3A3")],
)
def test_a_figure_is_drawn_from_its_measurement(index, name, shown, figures, tmp_path, monkeypatch):
    drawn, draw, source = figures.FROM_MEASUREMENTS[index]
    monkeypatch.setattr(figures, "DOCS", tmp_path)
    (tmp_path / "images").mkdir()
    figures.write(drawn, draw, json.loads((DOCS / "measurements" / source).read_text()))
    texts, marks = (
        [re.findall(pattern, (folder / f"{name}.svg").read_text())
         for folder in (tmp_path / "images", DOCS / "images")]
        for pattern in (r"<text[^>]*>([^<]+)</text>", r'<use .*? x="([\d.]+)"')
    )  # fmt: skip
    assert texts[0] == texts[1]
    assert shown in texts[0]
    assert len(marks[0]) == len(marks[1])
