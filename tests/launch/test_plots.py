import sys
from types import SimpleNamespace

import numpy as np
import pytest

from aquant_jax.errors import InputError
from aquant_jax.reporting.layers import border_values
from launch.lib import plots

pytestmark = pytest.mark.draws
POINTS = np.linspace(0, 3, 7, dtype=np.float32)


def report(name, error):
    return {
        "name": name,
        "loss_curve": np.zeros((0, 2)),
        "start_error": error,
        "final_error": error,
        "propagated": np.zeros((0 if name == "stem" else 16, 4)),
    }


def coefficients(taps=9, channels=4):
    rng = np.random.default_rng(0)
    return {f"b{k}": rng.normal(0.3 / 4**k, 0.05, (taps, channels)) for k in range(3)}


def test_border_values_of_every_column():
    border = coefficients()
    values = border_values("quadratic", border, "clamp", "element", POINTS)
    assert values.shape == (36, 7)
    expected = border["b0"][2, 3] + border["b1"][2, 3] * 1.5 + border["b2"][2, 3] * 1.5**2
    assert values[2 * 4 + 3, 3] == pytest.approx(np.clip(expected, 0, 1), abs=1e-6)


def test_fused_border_is_phi_of_the_mean_over_taps():
    border = coefficients() | {"b0": np.array([[-4.0], [1.0], [2.0]] * 3) * np.ones(4)}
    values = border_values("quadratic", border, "clamp", "mean", POINTS)
    mean = sum(border[f"b{k}"].mean(axis=0)[:, None] * POINTS**k for k in range(3))
    np.testing.assert_allclose(values, np.clip(mean, 0, 1), atol=1e-6)


def test_nothing_learned_draws_neither_losses_nor_borders(tmp_path):
    layer = SimpleNamespace(path="stem", border=None)
    reports = [report("stem", 0.0), report("head", 0.0)]
    recipe = SimpleNamespace(preset="nearest", border=None)
    plots.run_plots(recipe, reports, [layer], tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["block_error.png", "propagated_error.png"]


def test_the_whole_network_stage_has_losses_but_is_no_block(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "block_errors", lambda reports, _: drawn.append(reports))
    curve = np.array([[10, 2.0], [20, 1.0]])
    stage = {"name": "whole network", "loss_curve": curve, "held_out_curve": curve}
    recipe = SimpleNamespace(preset="aquant_plus", border=None)
    plots.run_plots(recipe, [report("stem", 0.0), stage], [], tmp_path)
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert [r["name"] for r in drawn[0]["aquant_plus"]] == ["stem"]


def test_presets_with_other_blocks_are_left_out_of_shared_axes(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "block_errors", lambda reports, _: drawn.append(list(reports)))
    cell = {"metric": "top1", "quantized": {"top1": 50.0}, "float": {"top1": 81.0}}
    cells = {
        "adaround": [cell | {"blocks": [report("conv", 1.0)]}],
        "qdrop": [cell | {"blocks": [report("stem", 1.0), report("head", 1.0)]}],
        "aquant": [cell | {"blocks": [report("stem", 1.0), report("head", 1.0)]}],
    }
    plots.comparison_plots(cells, tmp_path)
    assert drawn == [["qdrop", "aquant"]]


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install"):
        plots.require_matplotlib()
