"""Exports the network of a finished run of launch.quantize, and compares the export with it.

Each format has a folder WORKDIR/export/FORMAT with a report.json of the comparison:

- orbax: the packed checkpoint that aq.restore reads.
- stablehlo: network.stablehlo has weights and program in one, with plain XLA operations for CPU and
  CUDA; network_gpu_ops.stablehlo has the int8 custom calls of gpu_ops, which the process that runs
  it must import. jax.export.deserialize reads both.
- onnx: network.onnx for onnxruntime and network_openvino.onnx for OpenVINO, each in the form that
  the runtime runs in int8. Weights are integers, borders are standard operations.

All test samples of the run's config run through both networks. If more than one in a hundred gets
another class (or, without classes, another output), nothing is kept.

Example:

    python -m launch.export --workdir=runs/x --format=onnx
"""

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

import aquant_jax as aq
import gpu_ops
from aquant_jax import data
from aquant_jax.deployment import onnx, onnx_runtimes, stablehlo
from aquant_jax.deployment.onnx_runtimes import ONNXRUNTIME, OPENVINO
from aquant_jax.deployment.quantized import Quantized, traced
from aquant_jax.errors import InputError
from aquant_jax.storage import archive, json_file
from aquant_jax.storage.environment import environment
from aquant_jax.storage.folder_lock import hold
from aquant_jax.storage.ownership import remove_files
from launch.lib import command_line, experiment, run_directory

FORMATS = ("orbax", "stablehlo", "onnx")
ONNX_FILES = {"network.onnx": ONNXRUNTIME, "network_openvino.onnx": OPENVINO}
# Share of samples. Float layers (the first, where the image is not quantized) sum in another order
# on another runtime, and at 2 bits an activation that is rounded the other way can change a class.
MAY_DIFFER = 1e-2
CLOSE = 1e-3  # outputs that are not classes: largest difference, of the largest output
Runner = Callable[[Any], Any]


class Comparison(NamedTuple):
    """How an export differs from the network.

    Attributes:
        samples: run by both.
        same: of them, those with the same class, or with outputs that are close.
        difference: the largest of an output.
    """

    samples: int
    same: int
    difference: float


class Source(NamedTuple):
    """The network that is exported.

    Attributes:
        network: as restored.
        traced: the same, with a program traced from the code of the model.
        inputs: a batch.
    """

    network: Quantized
    traced: Callable[[], Quantized]
    inputs: Any


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    command_line.define_path(values, "workdir", None, "of launch.quantize; required")
    flags.DEFINE_enum("format", None, FORMATS, "to write; required", flag_values=values)
    command_line.define_path(values, "data_dir", None, "if not that of the run")
    flags.DEFINE_integer("limit", None, "test samples to compare", 1, flag_values=values)
    flags.mark_flags_as_required(["workdir", "format"], flag_values=values)


def compare(
    reference: Runner, other: Runner, batches: Iterator[data.Split], classes: int = 0
) -> Comparison:
    """Runs both on the same inputs; outputs with `classes` columns are logits."""
    samples = same = 0
    difference = 0.0
    for batch in batches:
        pairs = [jax.tree.leaves(run(batch.inputs)) for run in (reference, other)]
        agree = np.ones(len(batch.labels), bool)
        for left, right in zip(*(map(np.asarray, leaves) for leaves in pairs), strict=True):
            error = _error(left.astype(np.float32), right.astype(np.float32))
            difference = max(difference, float(error.max(initial=0.0)))
            if left.ndim == 2 and left.shape[1] == classes:
                agree &= (left.argmax(1) == right.argmax(1)) & np.isfinite(error).all(1)
            else:
                limit = CLOSE * np.abs(left).max(initial=0.0)
                agree &= error.reshape(len(error), -1).max(1) <= limit
        samples, same = samples + len(agree), same + int(agree.sum())
    return Comparison(samples, same, difference)


def _error(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Absolute differences; infinite where one of both is not a number."""
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    return np.where(same, 0.0, np.nan_to_num(np.abs(left - right), nan=np.inf))


def write_orbax(folder: Path, source: Source) -> dict[str, Runner]:
    """Saves the network once more."""
    aq.save(source.network, folder / "network")
    return {"network": aq.restore(folder / "network")}


def write_stablehlo(folder: Path, source: Source) -> dict[str, Runner]:
    """Writes the program by XLA's operations, and the one by custom calls."""
    compiled = source.traced().with_backend(gpu_ops.backend())
    programs = {
        "network.stablehlo": stablehlo.self_contained(source.network),
        "network_gpu_ops.stablehlo": stablehlo.self_contained(
            compiled, source.inputs, disabled_checks=gpu_ops.export_checks()
        ),
    }
    runners: dict[str, Runner] = {}
    for name, program in programs.items():
        (folder / name).write_bytes(stablehlo.serialize(program))
        written = jax.export.deserialize(bytearray((folder / name).read_bytes()))
        runners[name] = functools.partial(
            stablehlo.in_batches, jax.jit(written.call), size=written.in_avals[0].shape[0]
        )
    return runners


def write_onnx(folder: Path, source: Source) -> dict[str, Runner]:
    """Writes the network as ONNX for either runtime; onnxruntime stands in for one that is not
    installed."""
    runners = {}
    for name, runtime in ONNX_FILES.items():
        model = onnx.to_onnx(source.traced(), source.inputs, runtime)
        (folder / name).write_bytes(model.SerializeToString())
        there = importlib.util.find_spec(runtime) is not None
        runners[name] = onnx_runtimes.load(folder / name, runtime if there else ONNXRUNTIME)
    return runners


WRITERS = {"orbax": write_orbax, "stablehlo": write_stablehlo, "onnx": write_onnx}


def export(run: dict[str, Any], values: Any, target: Path) -> dict[str, Any]:
    """Writes and compares.

    Returns:
        The report.

    Raises:
        InputError: the checkpoint of the run is damaged, its data are missing, or an export
            computes something else than the network.
    """
    config: command_line.Config = ConfigDict(run["config"])
    data_dir = values.data_dir or run["data_dir"]
    network = aq.restore(Path(values.workdir) / run_directory.NETWORK)
    dataset, _ = experiment.open_data(config, data_dir)
    limit = values.limit or config.test_limit

    def batches() -> Iterator[data.Split]:
        skip = experiment.on_corrupt(config, [])
        return dataset.batches(config.eval_batch_size, limit, skip)

    inputs = next(iter(batches())).inputs

    def with_trace() -> Quantized:
        apply, variables, _ = experiment.create(config, data_dir, dataset)
        return dataclasses.replace(network, program=traced(apply, variables, inputs))

    target.mkdir(parents=True)
    report: dict[str, Any] = {}
    source = Source(network, with_trace, inputs)
    for name, other in WRITERS[values.format](target, source).items():
        comparison = compare(network, other, batches(), dataset.num_classes)
        _check(name, comparison)
        report[name] = comparison._asdict()
    return report


def _check(name: str, comparison: Comparison) -> None:
    """Prints how an export compares, or raises an InputError where it is another network."""
    samples, same, difference = comparison
    if samples - same > MAY_DIFFER * samples:
        raise InputError(
            f"{name} is not the network: {samples - same} of {samples} samples differ, outputs by "
            f"up to {difference:.3g}; nothing was kept"
        )
    at_most = f"outputs differ by {difference:.3g} at most"
    print(f"{name}: {same} of {samples} samples the same, {at_most}")


def read_run(workdir: str) -> dict[str, Any]:
    """The identity of the run in a workdir.

    Raises:
        InputError: it is not finished, or not one of launch.quantize.
    """
    run = run_directory.finished(workdir)
    if run.get("program") != "quantize":
        raise InputError(f"{workdir} holds a run of launch.{run.get('program')}")
    config = run.get("config")
    whole = isinstance(config, dict) and not [n for n in command_line.REQUIRED if n not in config]
    if not whole or not isinstance(run.get("data_dir"), str):
        raise InputError(
            f"{Path(workdir) / run_directory.IDENTITY} is damaged: it lacks the config"
        )
    return run


@command_line.program
def main(argv: list[str]) -> None:
    """Exports into a folder beside, which is renamed when all is compared."""
    values, _ = command_line.parse(argv, define_flags, __doc__)
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of values without a type
    target = Path(values.workdir) / run_directory.EXPORTS / values.format
    partial = target.with_name(f".{values.format}.partial")
    with hold(Path(values.workdir), lambda: read_run(values.workdir)) as run:
        replaced = run_directory.exported_files(target)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            report = export(run, values, partial)
            sizes = archive.sizes(partial)
            content = {"exports": report, "bytes": sizes, **environment()}
            json_file.write_json(partial / run_directory.REPORT, content)
            remove_files(target, replaced)
            partial.rename(target)
        except OSError as error:
            raise InputError(f"{target} cannot be written: {error.strerror}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # it holds other formats, or was never made
                target.parent.rmdir()
    print(f"in {target}: {sum(sizes.values()):,} bytes")


if __name__ == "__main__":
    sys.exit(main())
