"""Programs run from the checkout, as a user runs them, and one finished run for several files."""

from types import SimpleNamespace

import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax.deployment.sizes import Sizes
from aquant_jax.reporting import run
from launch import quantize
from launch.lib import plots, progress, reports
from tests.support.process import REPOSITORY, made_once

# One recipe for all tests that reconstruct the digits network: what one compiled, all have.
SMALL = (
    "--config.recipe.reconstruction.steps=2", "--config.recipe.reconstruction.batch_size=8",
    "--config.recipe.reconstruction.init_samples=32", "--config.calibration_size=32",
)  # fmt: skip
DIGITS = "--config=configs/digits.py:w2a2"
# Such tests keep JAX's standard promotion.
OPTAX = pytest.mark.user_model(reason="optax's Adam raises a float to an integer power")


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(autouse=True)
def without_plots(request, monkeypatch):
    """A run of a test draws nothing, unless the test reads its plots (draws)."""
    if not request.node.get_closest_marker("draws"):
        draw_nothing(monkeypatch)


def draw_nothing(patch):
    for name in ("run_plots", "comparison_plots"):
        patch.setattr(plots, name, lambda *_: None)
    for name in ("measure", "write_report"):
        patch.setattr(reports, name, lambda *_: None)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The directory of a finished run by aquant."""

    def run(path):
        assert quantize.main(["quantize", DIGITS, *SMALL, f"--workdir={path}"]) == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        return made_once(tmp_path_factory, "finished_run", run)


@pytest.fixture
def pretend(monkeypatch):
    """Replaces quantize by one that returns the float network and two made-up blocks."""
    calls = []

    def quantize_nothing(apply, variables, calibration, recipe, *, seed, observer, **_):
        calls.append((recipe.preset, seed))
        reports = tuple(make_report(index) for index in range(2))
        for report in reports:
            observer.on_block_end(report)
        return Pretended(apply=apply, variables=variables, recipe=recipe, reports=reports)

    monkeypatch.setattr(progress, "default_observer", aq.Observer)
    monkeypatch.setattr(aq, "quantize", quantize_nothing)
    monkeypatch.setattr(aq, "save", lambda *_: None)
    monkeypatch.setattr(run, "sizes", lambda _: Sizes(400, 100, 5, 5, 5, 5))
    monkeypatch.setattr(reports, "layer_records", lambda *_: [])
    return calls


class Pretended(SimpleNamespace):
    def __call__(self, x):
        return self.apply(self.variables, x)

    def summary(self):
        border = {
            name: np.full((9, 4), value) for name, value in (("b0", 0.4), ("b1", 0.1), ("b2", 0))
        }
        border = border if self.recipe.border else None
        fields = {"act_bits": 2, "zero_point": 0, "phi": "clamp", "border_granularity": "mean"}
        fields["border_function"] = self.recipe.border
        return [
            SimpleNamespace(path="stem", border=None, **fields),
            SimpleNamespace(path="block1/conv1", border=border, **fields),
        ]


def make_report(index):
    return aq.BlockReport(
        index=index,
        name=f"block{index}",
        layers=(f"conv{index}",),
        steps=2,
        loss_curve=np.array([[0, 2.0], [1, 1.0]]),
        start_error=2.0,
        final_error=1.0,
        fell_back_to_nearest=False,
        seconds=0.5,
        propagated=np.column_stack([np.linspace(0, 1, 16), np.full((16, 3), 0.25)]),
    )
