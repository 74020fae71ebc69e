"""A character model whose transformer layers are stacked by `nn.scan`: trained, quantized to W4A4.

The text is Python's own documentation of its language, which every installation has. Every layer
is quantized on its own (``layers/wi/kernel[3]``), and all layers compile once.

    python examples/character_stack.py --seed=0 --out=character_stack.json
"""

import json
from pathlib import Path
from pydoc_data.topics import topics

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import aquant_jax as aq
from aquant_jax.storage.environment import environment

SEED = flags.DEFINE_integer("seed", 0, "of weights and batches")
TRAIN_STEPS = flags.DEFINE_integer("train_steps", 1500, "of the float network")
STEPS = flags.DEFINE_integer("steps", 200, "of the reconstruction of a block")
SAMPLES = flags.DEFINE_integer("samples", 256, "sequences to calibrate on, and to test")
OUT = flags.DEFINE_string("out", None, "file to write the scores to")
LAYERS = flags.DEFINE_integer("layers", 4, "of the network")
LENGTH, WIDTH = 64, 64


class Layer(nn.Module):
    """One pre-norm causal transformer layer, as `nn.scan` takes it."""

    @nn.compact
    def __call__(self, x, _):
        causal = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(y, y, mask=causal)
        y = nn.Dense(4 * WIDTH, name="wi")(nn.LayerNorm()(x))
        return x + nn.Dense(WIDTH, name="wo")(nn.gelu(y)), None


class Characters(nn.Module):
    """Logits of the next character, of ``[samples, positions]`` characters."""

    alphabet: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.alphabet, WIDTH)(tokens)
        x = x + self.param("position", nn.initializers.normal(0.02), (LENGTH, WIDTH))[None]
        stack = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS.value
        )
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(self.alphabet, name="head")(nn.LayerNorm()(x))


def bits_per_character(logits, following):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, following)
    return losses.mean() / np.log(2)


def windows(text, count, rng):
    """Random windows of the text, and the characters that follow each of theirs."""
    starts = rng.integers(0, len(text) - LENGTH - 1, count)
    found = text[starts[:, None] + np.arange(LENGTH + 1)]
    return found[:, :-1], found[:, 1:]


def train(model, text, seed, steps):
    """The variables after Adam with a cosine schedule."""
    rng = np.random.default_rng(seed)
    variables = model.init(jax.random.key(seed), windows(text, 1, rng)[0])
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 3e-3, 100, max(steps, 101)))
    state = optimizer.init(variables)

    @jax.jit
    def step(variables, state, x, y):
        loss = lambda variables: bits_per_character(model.apply(variables, x), y)  # noqa: E731
        updates, state = optimizer.update(jax.grad(loss)(variables), state)
        return optax.apply_updates(variables, updates), state

    for _ in range(steps):
        variables, state = step(variables, state, *windows(text, 32, rng))
    return variables


def main(_):
    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet, tokens = np.unique(list(text), return_inverse=True)
    tokens = tokens.astype(np.int32)
    learned, held_out = tokens[: -len(tokens) // 10], tokens[-len(tokens) // 10 :]
    model = Characters(len(alphabet))
    variables = train(model, learned, SEED.value, TRAIN_STEPS.value)
    rng = np.random.default_rng(SEED.value + 1)
    calibration, _ = windows(learned, SAMPLES.value, rng)
    test, following = windows(held_out, SAMPLES.value, rng)

    def score(network):
        return float(bits_per_character(network(test), following))

    scores = {"float": score(lambda x: model.apply(variables, x))}
    for preset in ("nearest", "aquant"):
        steps = {} if preset == "nearest" else {"steps": STEPS.value}
        recipe = aq.recipes.preset(preset, weight_bits=4, act_bits=4, **steps)
        network = aq.quantize(
            model.apply, variables, calibration, recipe, seed=SEED.value, observer=aq.Observer()
        )
        scores[preset] = score(network)
    print(", ".join(f"{name} {value:.3f}" for name, value in scores.items()), "bits a character")
    results = {"bits_per_character": scores, "seed": SEED.value, "bits": 4}
    results |= {"steps": STEPS.value, "train_steps": TRAIN_STEPS.value, "samples": SAMPLES.value}
    if OUT.value:
        Path(OUT.value).write_text(json.dumps({**results, **environment()}, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
