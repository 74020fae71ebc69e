"""Fine-tunes a pretrained encoder of BERT's family on a GLUE task.

AdamW with linear warm-up and decay, as Devlin et al. (2018) did it. After each epoch the state is
kept in WORKDIR/epochs. Rerunning the command after an interruption resumes there, with
bit-identical results. WORKDIR/checkpoint is the result: config.json, model.safetensors and the
tokenizer, as configs/glue_bert.py (and Hugging Face's transformers) read them.

Example:

    python -m launch.finetune --task=mrpc --checkpoint=BERT --data_dir=DIR --workdir=runs/mrpc
"""

import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import flags
from safetensors import numpy as safetensors
from tqdm import tqdm

from aquant_jax import data
from aquant_jax.data import glue
from aquant_jax.errors import InputError
from aquant_jax.models import bert
from aquant_jax.models.importers import write
from aquant_jax.storage import json_file
from aquant_jax.storage.environment import environment
from aquant_jax.storage.parsing import malformed
from launch.lib import command_line, run_directory
from launch.lib.metrics import evaluate_batches
from launch.lib.run_directory import RunDirectory

EVAL_BATCH = 64
LENGTHS = 16  # batches are as long as their longest sequence, rounded up to a multiple of this
CLIP_NORM = 1.0
ELSEWHERE = ("workdir", "data_dir")  # flags that are not settings of the training
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")


class State(NamedTuple):
    """The contents of a checkpoint of an epoch."""

    params: Any
    optimizer: Any


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    flags.DEFINE_enum("task", None, list(glue.TASKS), "of GLUE; required", flag_values=values)
    command_line.define_path(values, "checkpoint", None, "folder of the encoder; required")
    command_line.define_path(values, "workdir", None, "folder to write into; required")
    command_line.define_path(values, "data_dir", "~", "holds tensorflow_datasets/")
    flags.DEFINE_integer("epochs", 3, "passes over the training split", 1, flag_values=values)
    flags.DEFINE_integer("batch_size", 32, "samples a step", 1, flag_values=values)
    flags.DEFINE_float("learning_rate", 5e-5, "its peak", 0.0, flag_values=values)
    flags.DEFINE_float("warmup", 0.1, "share of the steps", 0.0, 1.0, flag_values=values)
    flags.DEFINE_float("weight_decay", 0.01, "of matrices", 0.0, flag_values=values)
    flags.DEFINE_integer("max_length", 128, "tokens a sequence", 4, flag_values=values)
    flags.DEFINE_integer("train_limit", None, "random samples to train on", 1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "of head, batches and dropout", 0, flag_values=values)
    flags.mark_flags_as_required(["task", "checkpoint", "workdir"], flag_values=values)


def batches(split: data.Split, batch_size: int, seed: int, epoch: int) -> Iterator[data.Split]:
    """Shuffled batches of one epoch, cut to their longest sequence."""
    order = np.random.default_rng([seed, epoch]).permutation(len(split.labels))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        index = order[start : start + batch_size]
        longest = int(split.inputs["mask"][index].sum(1).max())
        length = -(-longest // LENGTHS) * LENGTHS
        yield data.Split(
            {k: a[index, :length] for k, a in split.inputs.items()}, split.labels[index]
        )


def make_step(model: bert.Bert, optimizer: optax.GradientTransformation) -> Callable:
    """The jitted training step ``(state, inputs, labels, key) -> (state, loss)``."""

    def loss_fn(
        params: Any, inputs: dict[str, jax.Array], labels: jax.Array, key: jax.Array
    ) -> jax.Array:
        out: Any = model.apply({"params": params}, inputs, train=True, rngs={"dropout": key})
        if model.labels == 1:
            return jnp.mean((out[:, 0] - labels) ** 2)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out, labels))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        state: State, inputs: dict[str, jax.Array], labels: jax.Array, key: jax.Array
    ) -> tuple[State, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_fn)(state.params, inputs, labels, key)
        updates, inner = optimizer.update(gradients, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), inner), loss

    return step


def make_optimizer(values: Any, steps: int) -> optax.GradientTransformation:
    """AdamW, linear warm-up and decay to zero; biases and normalisations do not decay."""
    warm = int(values.warmup * steps)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, values.learning_rate, max(warm, 1)),
            optax.linear_schedule(values.learning_rate, 0.0, max(steps - warm, 1)),
        ],
        [warm],
    )
    return optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.adamw(
            schedule,
            weight_decay=values.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )


def train(
    values: Any, model: bert.Bert, variables: Any, task: data.Dataset, directory: RunDirectory
) -> Any:
    """Trains the epochs that are missing.

    Returns:
        The parameters.
    """
    split = training_split(values, model, task)
    steps = len(split.labels) // values.batch_size
    optimizer = make_optimizer(values, steps * values.epochs)
    step = make_step(model, optimizer)
    params = jax.tree.map(jnp.asarray, variables["params"])
    state = State(params, optimizer.init(params))
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    records: list[dict[str, float]] = []
    directory.begin()
    with ocp.CheckpointManager(directory.epochs.resolve(), options=options) as manager:
        if manager.latest_step():
            state, records = restore(manager, state, directory.epochs)
        for record in records:
            directory.log(record)
        for epoch in range(len(records), values.epochs):
            state, loss = train_epoch(values, step, state, split, epoch)
            score = evaluate(model, {"params": state.params}, task)
            records.append({"epoch": epoch + 1, "loss": loss, **score})
            directory.log(records[-1])
            print(f"epoch {epoch + 1}: loss {loss:.4f}, {_text(score, task.metric)}", flush=True)
            log = ocp.args.JsonSave({"epochs": records})
            parts = ocp.args.Composite(state=ocp.args.StandardSave(state), log=log)
            manager.save(epoch + 1, args=parts)
    return state.params


def training_split(values: Any, model: bert.Bert, task: data.Dataset) -> data.Split:
    """The samples to train on.

    Raises:
        InputError: none, fewer than a batch, or inputs that the model cannot take, also among
            those that are scored.
    """
    if not task.train_size:
        raise InputError(f"glue/{values.task} has no training split")
    split = task.calibration(values.train_limit or task.train_size, values.seed)
    for part in (split, *task.batches(EVAL_BATCH)):
        bert.check_inputs(model.config, part.inputs)
    if len(split.labels) < values.batch_size:
        raise InputError(
            f"{len(split.labels)} samples are less than a batch of {values.batch_size}"
        )
    return split


def train_epoch(
    values: Any, step: Callable, state: State, split: data.Split, epoch: int
) -> tuple[State, float]:
    """One pass over the samples; the state after it and the mean loss.

    Raises:
        InputError: the loss is not finite.
    """
    key = jax.random.fold_in(jax.random.key(values.seed), epoch)
    losses = []
    total = len(split.labels) // values.batch_size
    bar = tqdm(batches(split, values.batch_size, values.seed, epoch), total=total, disable=None)
    for index, batch in enumerate(bar):
        dropout = jax.random.fold_in(key, index)
        state, loss = step(state, batch.inputs, batch.labels, dropout)
        losses.append(loss)
    mean = float(np.mean([float(loss) for loss in losses]))
    if not np.isfinite(mean):
        raise InputError(f"the loss of epoch {epoch + 1} is {mean}: lower --learning_rate")
    return state, mean


def restore(
    manager: ocp.CheckpointManager, like: State, folder: Path
) -> tuple[State, list[dict[str, float]]]:
    """State and log after the last epoch that was kept.

    Raises:
        InputError: it cannot be read.
    """
    read = ocp.args.StandardRestore(like)
    parts = ocp.args.Composite(state=read, log=ocp.args.JsonRestore())
    try:
        kept = manager.restore(manager.latest_step(), args=parts)
    except Exception as error:  # orbax raises the errors of its parts
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{folder} is damaged; remove it to train from the start: {reason}"
        ) from error
    return kept["state"], kept["log"]["epochs"]


def evaluate(model: bert.Bert, variables: Any, task: data.Dataset) -> dict[str, float]:
    """The score on the validation split."""
    predict = functools.partial(model.apply, variables)
    return evaluate_batches(predict, task.batches(EVAL_BATCH), task.num_classes, task.metric)


def save(folder: Path, source: Path, variables: Any, labels: int) -> None:
    """Writes a checkpoint as transformers reads it."""
    folder.mkdir(exist_ok=True)
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    fields = json.loads((source / "config.json").read_text())
    fields |= {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {str(i): f"LABEL_{i}" for i in range(labels)},
        "label2id": {f"LABEL_{i}": i for i in range(labels)},
    }
    arrays = bert.to_checkpoint(variables)
    named = {n if n.startswith("classifier") else f"bert.{n}": a for n, a in arrays.items()}
    write(folder / "model.safetensors", safetensors.save(named, {"format": "pt"}))
    json_file.write_json(folder / "config.json", fields)


def _text(score: dict[str, float], metric: str) -> str:
    return f"{metric} {score[metric]:.2f}% of {score['samples']:.0f} samples"


@command_line.program
def main(argv: list[str]) -> None:
    """Trains, writes the checkpoint and scores what was written."""
    values, _ = command_line.parse(argv, define_flags, __doc__)
    source = Path(values.checkpoint)
    flags_of_run = {name: values[name].value for name in values if name not in ELSEWHERE}
    settings = {name: value for name, value in flags_of_run.items() if value is not None}
    data_dir = command_line.absolute(values.data_dir)
    identity = {"program": "finetune", **settings, "data_dir": data_dir}
    with run_directory.claim(values.workdir, identity) as directory:
        tokenization = data.Tokenization(source, values.max_length)
        task = data.load(f"glue/{values.task}", values.data_dir, tokenization)
        target = directory.path / run_directory.CHECKPOINT
        if directory.stored is None:
            model, variables = bert.create(source, task.num_classes, values.seed)
            params = train(values, model, variables, task, directory)
            save(target, source, {"params": params}, task.num_classes)
            written, variables = bert.create(target, task.num_classes)
            score = evaluate(written, variables, task)
            directory.finish({**settings, "score": score, **environment()})
            shutil.rmtree(directory.epochs)
        else:
            score: Any = directory.stored.get("score")
    with malformed(directory.path / run_directory.RESULTS):
        text = _text(score, task.metric)
    print(f"{values.task}: {text}\nin {target}")


if __name__ == "__main__":
    sys.exit(main())
