"""Cells of a table: runs of one network in folders of their own, never repeated once finished."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

import aquant_jax as aq
import gpu_ops
from aquant_jax.errors import InputError
from launch.lib import command_line, experiment, run_directory
from launch.lib.results import one_line

STEPS = "recipe.reconstruction.steps"
Results = dict[str, list[dict[str, Any]]]  # of all seeds, by the name of the cell


class Cell(NamedTuple):
    """One row of a table: its name, the config as the user named it, and the config."""

    name: str
    spec: str
    config: command_line.Config


def parse_seeds(texts: list[str]) -> list[int]:
    """Reads ``--seeds``; raises ``InputError`` for anything but different whole numbers."""
    if not texts or not all(re.fullmatch(r"\d{1,20}", text.strip()) for text in texts):
        raise InputError(f"seeds must be whole numbers such as 0,1,2, not {','.join(texts)!r}")
    return list(dict.fromkeys(int(text) for text in texts))


def load_config(spec: str, overrides: dict[str, str], variant: str) -> command_line.Config:
    """Loads the config of one row; a preset without steps (nearest) stays without any."""
    plain = command_line.load_config(spec, {}, variant)
    if plain.recipe.reconstruction.steps == 0:
        overrides = {field: text for field, text in overrides.items() if field != STEPS}
    config = command_line.load_config(spec, overrides, variant)
    experiment.recipe_of(config)  # says what is wrong before anything is run
    return config


def path_of(folder: Path, name: str, seed: int) -> Path:
    """The directory of a run, in the folder of its network."""
    return folder / f"{name}-s{seed}"


def run(
    folder: Path,
    data_dir: str,
    cells: list[Cell],
    seeds: list[int],
    mesh: Mesh | None = None,
    memory_limit: int | None = None,
) -> Results:
    """Runs the cells that are not finished.

    Args:
        folder: each (cell, seed) has its directory in it, see `path_of`.
        data_dir: of the configs.
        cells: of one network and data set, which are loaded once, and only if necessary.
        seeds: of every cell.
        mesh, memory_limit: see ``aquant_jax.quantize``.

    Returns:
        The results of all seeds, by the name of the cell.
    """
    loaded: experiment.Experiment | None = None
    results: Results = {cell.name: [] for cell in cells}
    for name, spec, config in cells:
        compiler = aq.Compiler(gpu_ops.backend())
        for seed in seeds:
            identity = experiment.identity(config, seed, data_dir)
            with run_directory.claim(path_of(folder, name, seed), identity) as directory:
                run_results = directory.stored
                if run_results is None:
                    loaded = loaded or experiment.load(config, data_dir, mesh, memory_limit)
                    run_results = experiment.run(loaded, config, spec, seed, directory, compiler)
            print(one_line(run_results, directory.path), flush=True)
            results[name].append(run_results)
    return results
