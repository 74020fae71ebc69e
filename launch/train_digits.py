"""Trains the float digits network of the demo, and no other, and writes its checkpoint.

Data augmentation is a shift by up to one pixel; AdamW with a cosine schedule.

Example:

    python -m launch.train_digits --output=aquant_jax/models/digits_cnn.safetensors
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx
from tqdm import tqdm

from aquant_jax import data, models
from aquant_jax.errors import InputError
from aquant_jax.models import importers
from aquant_jax.models.digits_cnn import DigitsCNN
from launch.lib import command_line
from launch.lib.metrics import evaluate


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    command_line.define_path(values, "output", None, "safetensors file to write; required")
    text = "of weights, batches and shifts"
    flags.DEFINE_integer("seed", 0, text, 0, 2**63 - 1, flag_values=values)
    flags.DEFINE_integer("epochs", 40, "passes over the training split", 1, flag_values=values)
    flags.DEFINE_integer("batch_size", 32, "images a step", 1, 1297, flag_values=values)
    flags.DEFINE_float("learning_rate", 3e-3, "its peak", 0.0, flag_values=values)
    flags.mark_flags_as_required(["output"], flag_values=values)


def batches(
    split: data.Split, epochs: int, batch_size: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields shuffled batches, every image shifted by -1, 0 or 1 pixel in each direction."""
    rng = np.random.default_rng(seed)
    padded = np.pad(split.inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for _ in range(epochs):
        order = rng.permutation(len(split.labels))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            indices = order[start : start + batch_size]
            shifts = rng.integers(0, 3, size=(batch_size, 2))
            corners = zip(indices, shifts, strict=True)
            images = np.stack([padded[i, r : r + 8, c : c + 8] for i, (r, c) in corners])
            yield images, split.labels[indices]


def train(
    split: data.Split, epochs: int, batch_size: int, learning_rate: float, seed: int
) -> dict[str, Any]:
    """Returns the trained variables (nested dicts of arrays) of a ``DigitsCNN``."""
    graphdef, params, stats = nnx.split(DigitsCNN(rngs=nnx.Rngs(seed)), nnx.Param, nnx.BatchStat)
    steps = epochs * (len(split.labels) // batch_size)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps)
    optimizer = optax.adamw(schedule, weight_decay=1e-2)

    def loss_fn(
        params: Any, stats: Any, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params, stats, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images, True), labels)
        return jnp.mean(losses), nnx.state(model, nnx.BatchStat)

    @jax.jit
    def step(params: Any, stats: Any, opt_state: Any, images: jax.Array, labels: jax.Array) -> Any:
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, stats), grads = grad_fn(params, stats, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, loss

    opt_state = optimizer.init(params)
    progress = tqdm(batches(split, epochs, batch_size, seed), total=steps)
    for images, labels in progress:
        params, stats, opt_state, loss = step(params, stats, opt_state, images, labels)
        progress.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
    return nnx.to_pure_dict(nnx.merge_state(params, stats))


@command_line.program
def main(argv: list[str]) -> None:
    """Trains, writes the checkpoint and scores what was written."""
    values, _ = command_line.parse(argv, define_flags, __doc__)
    output = Path(values.output)
    if not output.parent.is_dir():
        raise InputError(f"{output} cannot be written: {output.parent} is not a folder")
    if output.is_dir():
        raise InputError(f"{output} cannot be written: it is a folder")
    digits = data.load("digits")
    split = digits.calibration(digits.train_size, values.seed)
    importers.save(
        output, train(split, values.epochs, values.batch_size, values.learning_rate, values.seed)
    )
    apply, variables = models.create("digits_cnn", output)
    for name, images, labels in (("train", *split), ("held-out", *digits.test())):
        metrics = evaluate(lambda x: apply(variables, x), images, labels)
        print(f"{name}: {metrics['top1']:.2f}% top-1 of {len(labels)} images")


if __name__ == "__main__":
    sys.exit(main())
