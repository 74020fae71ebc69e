"""One cell of a table: a config quantized with one seed, and everything written about it."""

import dataclasses
import importlib.metadata
import platform
import time
from pathlib import Path
from typing import Any

import jax

import aquant_jax as aq
from aquant_jax import data, models, plots, workdir
from aquant_jax.errors import InputError
from aquant_jax.evaluate import evaluate
from launch.common import Config

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "aquant-jax")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What all cells of a config share: the float network, its data and its score."""

    apply: models.Apply
    variables: models.Variables
    dataset: data.Dataset
    test: data.Split
    float_metrics: dict[str, float]


def load(config: Config, data_dir: str) -> Experiment:
    """Loads the model and the data of a config and scores the float network.

    Raises:
        InputError: an unknown model or data set, or one that is not in ``data_dir``.
    """
    apply, variables = models.create(config.model, _weights_path(config, data_dir))
    dataset = data.load(config.dataset, data_dir)
    test = dataset.test(config.test_limit)
    float_metrics = evaluate(
        lambda images: apply(variables, images), *test, batch_size=config.eval_batch_size
    )
    return Experiment(apply, variables, dataset, test, float_metrics)


def recipe_of(config: Config) -> aq.Recipe:
    """Builds the recipe of a config.

    Raises:
        InputError: a field has a value that the recipe does not accept.
    """
    return aq.recipes.preset(config.preset, **config.recipe.to_dict())


def identity(config: Config, seed: int) -> dict[str, Any]:
    """What makes two cells the same run."""
    return {"program": "quantize", "config": config.to_dict(), "seed": seed}


def run(
    experiment: Experiment,
    config: Config,
    spec: str,
    seed: int,
    folder: workdir.Run,
    compiler: aq.Compiler | None = None,
) -> dict[str, Any]:
    """Quantizes, scores and writes log, plots and results.

    Args:
        experiment: of ``load``.
        config: whose preset, recipe and calibration size are used.
        spec: how the user named the config.
        seed: of the calibration draw and of the reconstruction.
        folder: where to write.
        compiler: shares compiled steps between runs of one recipe.

    Returns:
        The results, as written.
    """
    recipe = recipe_of(config)
    calibration = experiment.dataset.calibration(config.calibration_size, seed)
    start = time.perf_counter()
    quantized = aq.quantize(
        experiment.apply,
        experiment.variables,
        calibration.images,
        recipe,
        seed=seed,
        on_block=lambda report: folder.log(report._asdict()),
        compiler=compiler,
    )
    seconds = time.perf_counter() - start
    metrics = evaluate(quantized, *experiment.test, batch_size=config.eval_batch_size)
    reports = [report._asdict() for report in quantized.reports]
    results = {
        "config": spec,
        "preset": config.preset,
        "weight_bits": recipe.weight_bits,
        "act_bits": recipe.act_bits,
        "seed": seed,
        "float": experiment.float_metrics,
        "quantized": metrics,
        "seconds": seconds,
        "calibration_images": len(calibration.labels),
        "test_images": len(experiment.test.labels),
        "recipe": recipe.to_dict(),
        "blocks": [block_summary(report) for report in reports],
        **environment(),
    }
    plots.run_plots(recipe, reports, quantized.summary(), folder.plots)
    folder.finish(results)
    return workdir.jsonable(results)


def block_summary(report: dict[str, Any]) -> dict[str, Any]:
    """A report without its loss curve, which is in the log."""
    return {field: value for field, value in report.items() if field != "loss_curve"}


def environment() -> dict[str, Any]:
    """The device and the versions that a result was got with."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
        },
    }


def one_line(results: dict[str, Any]) -> str:
    """The result of a cell in words."""
    return (
        f"{results['preset']} w{results['weight_bits']}a{results['act_bits']} "
        f"seed {results['seed']}: {results['quantized']['top1']:.2f}% top-1 "
        f"(float {results['float']['top1']:.2f}%) of {results['test_images']} images, "
        f"{results['seconds']:.0f} s on {results['device']}"
    )


def _weights_path(config: Config, data_dir: str) -> Path:
    if config.weights != "embedded":
        return Path(data_dir).expanduser() / config.weights
    if config.model in models.EMBEDDED or config.model not in models.MODELS:
        return models.EMBEDDED.get(config.model, Path())
    raise InputError(f"no weights of {config.model} come with the package: name a file")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
