"""Figures of matplotlib as elements of a page, which takes their colours and font from its style.

A figure is drawn in placeholder colours; in the page these are CSS variables, so that one drawing
serves a light and a dark screen.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import numpy as np

from aquant_jax.errors import InputError, install_command

INK, FAINT, GRID = "#010101", "#020202", "#030303"
SERIES = tuple(f"#04040{k}" for k in range(8))
VARIABLES = {INK: "--ink", FAINT: "--faint", GRID: "--rule"} | {
    colour: f"--s{k}" for k, colour in enumerate(SERIES)
}
DPI = 72  # matplotlib's SVG has one unit a point
SMALL, WIDE = (3.4, 2.1), 4.6  # inches
INNER = (0.16, 0.21, 0.81, 0.66)  # of a small figure: its axes
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "aquant",  # the same data give the same file
    "path.simplify": True,
    "font.size": 9,
    "text.color": FAINT,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "xtick.bottom": False,
    "ytick.left": False,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_NAMESPACE = re.compile(r"\{[^}]*\}")
_DECIMALS = re.compile(r"-?\d+\.\d{3,}")
_COLOUR = re.compile(r"#0[1-4]0[1-4]0[0-9a-f]")
_FONT = re.compile(r"font: ([\d.]+px) [^;]*|; font-family: [^;]*")
_SPACE = re.compile(r"\s+")


@functools.cache
def matplotlib() -> Any:
    """The package.

    Raises:
      InputError: it is not installed.
    """
    try:
        import matplotlib as package
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise InputError(f"a report needs matplotlib: {install_command('report')}") from error
    return package


def draw(
    plot: Callable[[Any], None], label: str, height: float | None = None
) -> ElementTree.Element:
    """A figure with one pair of axes.

    Args:
      plot: draws on the axes.
      label: what it shows, for those who do not see it.
      height: in inches, of a wide figure, whose axes leave the names beside them the place that
        they need; None makes one of many small ones.

    Raises:
      InputError: matplotlib is not installed.
    """
    package = matplotlib()
    out = io.StringIO()
    size = SMALL if height is None else (WIDE, height)
    with package.rc_context(STYLE):
        figure = package.figure.Figure(size, DPI, layout="constrained" if height else None)
        axes = figure.add_subplot() if height else figure.add_axes(INNER)  # the former is slow
        plot(axes)
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_locator(), package.ticker.AutoLocator):
                axis.get_major_locator().set_params(nbins=5)
                axis.set_major_formatter(lambda value, _: f"{value:.4g}")
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=metadata, transparent=True)
    return _element(out.getvalue(), label)


def _element(text: str, label: str) -> ElementTree.Element:
    svg = ElementTree.fromstring(text)
    for parent in list(svg.iter()):
        for child in list(parent):
            if _NAMESPACE.sub("", child.tag) in ("style", "metadata"):
                parent.remove(child)
    for element in svg.iter():
        element.tag = _NAMESPACE.sub("", element.tag)
        found = {_NAMESPACE.sub("", key): value for key, value in element.items()}
        element.attrib.clear()
        element.attrib.update({key: _attribute(key, value) for key, value in found.items()})
    _drop_unused_names(svg)
    _drop_groups(svg)
    for name in ("width", "height", "version"):
        svg.attrib.pop(name, None)
    svg.attrib |= {"role": "img", "aria-label": label}
    return svg


def _attribute(key: str, value: str) -> str:
    if key == "style":
        value = _COLOUR.sub(lambda m: f"var({VARIABLES.get(m[0], '--ink')})", value)
        return _FONT.sub(lambda m: f"font-size: {m[1]}" if m[1] else "", value)
    if key in ("d", "x", "y", "transform", "width", "height"):
        value = _DECIMALS.sub(lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), value)
        return _SPACE.sub(" ", value).strip()
    return value


def _drop_unused_names(svg: ElementTree.Element) -> None:
    """A page may have no id twice; those that are used name their content, so twins are equal."""
    used = {
        name
        for element in svg.iter()
        for value in element.attrib.values()
        for name in re.findall(r"#([\w-]+)", value)
    }
    for element in svg.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)


def _drop_groups(parent: ElementTree.Element) -> None:
    """Puts the content of groups without attributes in their place, and drops blank text."""
    children: list[ElementTree.Element] = []
    for child in parent:
        _drop_groups(child)
        child.tail = None
        bare = child.tag == "g" and not child.attrib
        children += list(child) if bare else [child]
    if len(parent):
        parent.text = None
    parent[:] = children


def log_scale(axes: Any, axis: str, *values: Any) -> None:
    """A logarithmic axis where positive values span more than a factor of ten."""
    found = np.concatenate([np.ravel(np.asarray(value, np.float64)) for value in values])
    found = found[found > 0]
    if found.size and found.max() > 10 * found.min():
        getattr(axes, f"set_{axis}scale")("log")
        axes.minorticks_off()
        getattr(axes, f"{axis}axis").set_major_formatter(lambda value, _: f"{value:g}")
