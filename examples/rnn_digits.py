"""An LSTM that reads digits row by row: trained, quantized, scored on held-out digits.

Its recurrent loop stays rolled: every weight has one grid, and the step size and border of the
recurrent input are learned over all time steps.

    python examples/rnn_digits.py --seed=0 --out=rnn_digits.json
"""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import aquant_jax as aq
from aquant_jax import data
from aquant_jax.storage.environment import environment

SEED = flags.DEFINE_integer("seed", 0, "of weights and batches")
EPOCHS = flags.DEFINE_integer("epochs", 40, "passes over the training digits")
STEPS = flags.DEFINE_integer("steps", 400, "of the reconstruction of a block")
BITS = flags.DEFINE_integer("bits", 4, "of weights and activations, in all layers")
OUT = flags.DEFINE_string("out", None, "file to write the scores to")


class Reader(nn.Module):
    """Reads ``[samples, rows, pixels]``; the last state gives the digit."""

    @nn.compact
    def __call__(self, x):
        states = nn.RNN(nn.LSTMCell(64))(x)
        return nn.Dense(10)(states[:, -1])


def train(model, rows, labels, seed, epochs):
    """The variables after Adam with a cosine schedule."""
    variables = model.init(jax.random.key(seed), rows[:1])
    batches = len(rows) // 32
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, epochs * batches))
    state = optimizer.init(variables)

    @jax.jit
    def step(variables, state, x, y):
        def loss(variables):
            logits = model.apply(variables, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = optimizer.update(jax.grad(loss)(variables), state)
        return optax.apply_updates(variables, updates), state

    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        for index in rng.permutation(len(rows))[: batches * 32].reshape(batches, 32):
            variables, state = step(variables, state, rows[index], labels[index])
    return variables


def main(_):
    digits = data.load("digits")
    (rows, labels), (test_rows, test_labels) = (
        (np.asarray(images)[..., 0], np.asarray(labels))
        for images, labels in (digits.calibration(digits.train_size, 0), digits.test())
    )
    model = Reader()
    variables = train(model, rows, labels, SEED.value, EPOCHS.value)

    def score(network):
        return 100 * float(jnp.mean(jnp.argmax(network(test_rows), -1) == test_labels))

    scores = {"float": score(lambda x: model.apply(variables, x))}
    for preset in ("nearest", "aquant"):
        steps = {} if preset == "nearest" else {"steps": STEPS.value}
        recipe = aq.recipes.preset(preset, weight_bits=BITS.value, act_bits=BITS.value, **steps)
        recipe = recipe.replace(first_weight_bits=None, last_weight_bits=None, last_act_bits=None)
        recipe = recipe.replace(quantize_input=True)
        network = aq.quantize(
            model.apply, variables, rows[:1024], recipe, seed=SEED.value, observer=aq.Observer()
        )
        scores[preset] = score(network)
    print(", ".join(f"{name} {value:.2f}%" for name, value in scores.items()))
    results = {"top1": scores, "seed": SEED.value, "steps": STEPS.value, "bits": BITS.value}
    if OUT.value:
        Path(OUT.value).write_text(json.dumps({**results, **environment()}, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
