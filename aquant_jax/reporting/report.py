"""`report`: a network and how it was made, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aquant_jax.deployment.quantized import Quantized, check_quantized
from aquant_jax.errors import InputError, reason, to_path
from aquant_jax.reporting.layers import layer_records
from aquant_jax.reporting.page import page
from aquant_jax.reporting.run import Run, describe
from aquant_jax.storage.environment import environment
from aquant_jax.storage.json_file import jsonable, write_text


def report(
    quantized: Quantized, path: str | Path, inputs: Any = None, variables: Any = None
) -> None:
    """Writes a report of a network: a self-contained HTML file with tables and figures.

    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> import aquant_jax as aq
    >>> apply = lambda variables, x: x @ variables["kernel"]
    >>> samples = np.eye(4, dtype=np.float32)
    >>> network = aq.quantize(apply, {"kernel": samples}, samples, aq.recipes.nearest(8, 8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     aq.report(network, f"{folder}/report.html")
    ...     pathlib.Path(folder, "report.html").read_text()[:15]
    '<!DOCTYPE html>'

    It needs matplotlib: ``pip install -e '.[report]'`` in the clone.

    Args:
      quantized: from `quantize` or `restore`.
      path: of the file, which is replaced.
      inputs: a batch of some ten samples, for the histograms of activations; only with a network
        that was not restored.
      variables: of the float network, for the histograms of float weights and the error of every
        layer; they need `inputs`.

    Raises:
      InputError: the file cannot be written, matplotlib is not installed, or inputs or variables
        that cannot be used (see above).
    """
    check_quantized(quantized)
    layers = jsonable(layer_records(quantized, inputs, variables))
    curves = {r.index: jsonable(r.loss_curve) for r in quantized.reports}
    run = Run(
        quantized.recipe.preset, jsonable(describe(quantized) | environment()), curves, layers
    )
    write(to_path("path", path), page([run], f"{run.name} {run.bits}"))


def write(path: Path, text: str) -> None:
    """Writes a report, whole or not at all.

    Raises:
      InputError: the file cannot be written.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise InputError(f"report {path} cannot be written: {reason(error)}") from error
