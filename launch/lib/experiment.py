"""One cell of a table: a config quantized with one seed, and everything written about it."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from tqdm import tqdm

import aquant_jax as aq
import gpu_ops
from aquant_jax import data, models
from aquant_jax.errors import InputError
from aquant_jax.models import bert
from aquant_jax.reporting.run import describe
from aquant_jax.storage import json_file
from aquant_jax.storage.environment import environment
from launch.lib import augmentations, hosts, plots, preprocessing, process, progress, reports
from launch.lib.allocations import measured
from launch.lib.command_line import Config, absolute
from launch.lib.metrics import Predict, evaluate_batches, float_network
from launch.lib.run_directory import RunDirectory
from launch.lib.shares import read_calibration

BERT = "bert"
LENGTHS = ("max_length", "calibration_length")
OF_BERT = (*LENGTHS, "apart")
Check = Callable[[Any], None]


def no_check(inputs: Any) -> None:
    """For networks that accept all inputs of their shapes."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The part that all cells of a config share: the float network, its data and its score.

    Attributes:
        apply: the float network.
        variables: its weights.
        dataset: to score on.
        calibration: to calibrate on, the same unless the config names another.
        float_metrics: score of the float network.
        check: raises an ``InputError`` for inputs that the network cannot take.
        mesh, memory_limit: see ``aquant_jax.quantize``.
        origin: fields of the results that say where the recipe comes from.
    """

    apply: models.Apply
    variables: models.Variables
    dataset: data.Dataset
    calibration: data.Dataset
    float_metrics: dict[str, float]
    check: Check = no_check
    mesh: Mesh | None = None
    memory_limit: int | None = None
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)


def load(
    config: Config, data_dir: str, mesh: Mesh | None = None, memory_limit: int | None = None
) -> Experiment:
    """Loads the model and the data of a config and scores the float network.

    Raises:
        InputError: an unknown model or data set, one that is not in ``data_dir``, fewer
            calibration images than the config asks for, or a size that is not a whole number.
    """
    dataset, calibration = open_data(config, data_dir)
    calibration.check_calibration(config.calibration_size)  # before hours of scoring
    apply, variables, check = create(config, data_dir, dataset)
    predict = float_network(apply, variables, config.model, dataset.name)
    float_metrics = score(predict, dataset, config, "float", check=check, mesh=mesh)
    return Experiment(
        apply, variables, dataset, calibration, float_metrics, check, mesh, memory_limit
    )


def create(
    config: Config, data_dir: str, dataset: data.Dataset
) -> tuple[models.Apply, models.Variables, Check]:
    """The network of a config, its weights, and the check of its inputs.

    Raises:
        InputError: an unknown model, or weights that do not fit it.
    """
    weights = _weights_path(config, data_dir)
    if config.model != BERT:
        return *models.create(config.model, weights), no_check
    model, variables = bert.create(weights, dataset.num_classes or None)
    return model.apply, variables, functools.partial(bert.check_inputs, model.config)


def score(
    predict: Predict,
    dataset: data.Dataset,
    config: Config,
    name: str,
    corrupt: list[str] | None = None,
    check: Check = no_check,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Scores a network on the test set of a config, with a bar of samples a second on a terminal.

    Args:
        predict: inputs -> logits.
        dataset: to score on.
        config: whose test limit and batch size are used.
        name: shown before the bar.
        corrupt: gets the names of the images left out, if the config has ``skip_corrupt``.
        check: of the inputs.
        mesh: devices to split the samples of a batch over.

    Returns:
        The metrics of ``evaluate_batches``.

    Raises:
        InputError: as ``evaluate_batches``, or an image cannot be decoded.
    """
    skip = on_corrupt(config, [] if corrupt is None else corrupt)
    batches = dataset.batches(config.eval_batch_size, config.test_limit, skip)
    total = config.test_limit or dataset.test_size
    hidden = None if hosts.is_first() else True
    with tqdm(total=total, desc=f"score {name}", unit="", disable=hidden) as bar:

        def checked() -> Iterator[data.Split]:
            for batch in batches:
                check(batch.inputs)
                yield batch
                bar.update(len(batch.labels))

        return evaluate_batches(predict, checked(), dataset.num_classes, dataset.metric, mesh)


def recipe_of(config: Config) -> aq.Recipe:
    """Builds the recipe of a config.

    Raises:
        InputError: a field has a value that the recipe does not accept.
    """
    fields = config.recipe.to_dict()
    learning = fields.pop("reconstruction", {})  # flat, what it lacks stays the preset's
    return aq.recipes.preset(config.preset, **fields, **learning)


def augment_of(config: Config, recipe: aq.Recipe) -> Any:
    """The augmentation of a config, where its recipe has a stage that uses it.

    Raises:
        InputError: an unknown name.
    """
    augment = augmentations.get(config.get("augment"))
    return augment if recipe.reconstruction.whole_network_steps else None


def identity(config: Config, seed: int, data_dir: str) -> dict[str, Any]:
    """Two cells are the same run if these are equal."""
    return {
        "program": "quantize",
        "config": config.to_dict(),
        "seed": seed,
        "data_dir": absolute(data_dir),
    }


def run(
    experiment: Experiment,
    config: Config,
    spec: str,
    seed: int,
    directory: RunDirectory,
    compiler: aq.Compiler | None = None,
    restart_from: int | None = None,
) -> dict[str, Any]:
    """Quantizes, scores and writes log, network, plots and results.

    Args:
        experiment: of ``load``.
        config: whose preset, recipe and calibration size are used.
        spec: how the user named the config.
        seed: of the calibration draw and of the reconstruction.
        directory: where to write.
        compiler: shares compiled steps between runs of one recipe.
        restart_from: the first of the blocks in the directory to learn again.

    Returns:
        The results, as written.
    """
    recipe = recipe_of(config)
    dataset, check, mesh = experiment.dataset, experiment.check, experiment.mesh
    corrupt: list[str] = []
    few = max(config.eval_batch_size, recipe.reconstruction.batch_size, reports.SAMPLES)
    skip = on_corrupt(config, corrupt)
    size = config.calibration_size
    calibration = read_calibration(experiment, size, seed, directory.path, skip, few)
    quantized = aq.quantize(
        experiment.apply, experiment.variables, calibration.inputs, recipe,
        mask=config.get("mask"), seed=seed, observer=progress.observer(directory),
        compiler=compiler or aq.Compiler(gpu_ops.backend()), augment=augment_of(config, recipe),
        mesh=mesh, memory_limit=experiment.memory_limit, resume=directory.blocks,
        restart_from=restart_from,
    )  # fmt: skip
    if hosts.is_first():
        aq.save(quantized, directory.network, _test_inputs(dataset, config))
    metrics = score(quantized, dataset, config, "quantized", corrupt, check, mesh)
    content = {
        "config": spec,
        **describe(quantized) | measured(experiment, quantized, calibration.few, config),
        "seed": seed,
        **_scores(experiment, metrics),
        "calibration_samples": calibration.samples,
        "corrupt_images": corrupt,
        **process.usage(),
        **environment(),
    }
    if hosts.is_first():
        _finish(quantized, content, directory, (calibration.few, experiment.variables))
    return json_file.jsonable(content)


def _finish(
    quantized: aq.Quantized, content: dict[str, Any], directory: RunDirectory, data: tuple[Any, Any]
) -> None:
    """Writes what the finished network tells; `data` are calibration inputs and float variables."""
    reports.measure(quantized, *data, directory.path)
    fields = [report._asdict() for report in quantized.reports]
    plots.run_plots(quantized.recipe, fields, quantized.summary(), directory.plots)
    directory.finish(content)
    reports.write_report(directory.path)


def _scores(experiment: Experiment, metrics: dict[str, float]) -> dict[str, Any]:
    scores = {"float": experiment.float_metrics, "quantized": metrics}
    return {"metric": experiment.dataset.metric, **scores, "test_samples": metrics["samples"]}


def _test_inputs(dataset: data.Dataset, config: Config) -> Any:
    """The first batch that is scored: the saved program takes inputs of its shapes."""
    skip = on_corrupt(config, [])
    return next(iter(dataset.batches(config.eval_batch_size, config.test_limit, skip))).inputs


def open_data(config: Config, data_dir: str) -> tuple[data.Dataset, data.Dataset]:
    """The data set to score on, and the one to calibrate on.

    Raises:
        InputError: an unknown data set, one that is not in ``data_dir``, a field of the config that
            is not a string or a whole number, an unknown augmentation, or fields that BERT lacks.
    """
    augmentations.get(config.get("augment"))
    for name in ("model", "weights", "dataset"):
        if not isinstance(value := config[name], str):
            raise InputError(f"config field {name} is {value!r}; it must be a string")
    for name in ("calibration_size", "eval_batch_size", "test_limit", *LENGTHS):
        value = config.get(name, 1)
        positive = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not positive and not (name == "test_limit" and value is None):
            raise InputError(f"config field {name} is {value!r}; it must be a positive integer")
    if config.model == BERT:
        if missing := [name for name in OF_BERT if name not in config]:
            raise InputError(f"model {BERT!r} needs the config fields {', '.join(missing)}")
        return _open_sentences(config, data_dir)
    how = preprocessing.of(config, config.dataset)
    dataset = data.load(config.dataset, data_dir, how, config.get("test_split"))
    name = config.get("calibration_dataset") or config.dataset
    if name == config.dataset:
        return dataset, dataset
    return dataset, data.load(name, data_dir, preprocessing.of(config, name))


def _open_sentences(config: Config, data_dir: str) -> tuple[data.Dataset, data.Dataset]:
    """The task, and the set to calibrate on, for which shorter sequences suffice."""
    folder = _weights_path(config, data_dir)
    lengths = config.max_length, config.calibration_length
    names = config.dataset, config.get("calibration_dataset") or config.dataset
    dataset, calibration = (
        data.load(name, data_dir, data.Tokenization(folder, length, config.apart))
        for name, length in zip(names, lengths, strict=True)
    )
    return dataset, calibration


def on_corrupt(config: Config, names: list[str]) -> data.OnCorrupt:
    """Receives the names of images that cannot be decoded; None if these end the run."""
    return names.append if config.get("skip_corrupt") else None


def _weights_path(config: Config, data_dir: str) -> Path:
    if config.weights != "embedded":
        # An unknown home folder stays, so that the message names the file.
        return Path(data_dir).expanduser() / os.path.expanduser(config.weights)
    if config.model in models.EMBEDDED or config.model not in models.MODELS:
        return models.EMBEDDED.get(config.model, Path())
    raise InputError(f"no weights of {config.model} come with the package: name a file")
