"""Flax NNX: `nnx.split` gives the state to quantize; `nnx.merge` rebuilds the model around it.

python examples/nnx_model.py
"""

import jax.numpy as jnp
from absl import app, flags
from flax import nnx

import aquant_jax as aq
from aquant_jax import data, models
from aquant_jax.models.digits_cnn import DigitsCNN

STEPS = flags.DEFINE_integer("steps", 100, "of the reconstruction of a block")
PRESET = flags.DEFINE_string("preset", "aquant", "of the recipe")


def main(_):
    digits = data.load("digits")
    images, _ = digits.calibration(1024, 0)
    test_images, test_labels = digits.test()
    # A trained model of yours takes the place of these three lines.
    model = DigitsCNN(rngs=nnx.Rngs(0))
    _, trained = models.create("digits_cnn", models.DIGITS_WEIGHTS)
    nnx.update(model, trained)

    graph, state = nnx.split(model)

    def apply(state, x):
        return nnx.merge(graph, state)(x, False)  # not training: the running statistics

    bits = {"weight_bits": 4, "act_bits": 4}
    recipe = aq.recipes.preset(PRESET.value, **bits, steps=STEPS.value)
    network = aq.quantize(apply, state, images, recipe, observer=aq.Observer())

    def score(run):
        return 100 * float(jnp.mean(jnp.argmax(run(test_images), -1) == test_labels))

    print(f"float {score(lambda x: apply(state, x)):.2f}%, w4a4 {score(network):.2f}%")
    aq.summary(network)


if __name__ == "__main__":
    app.run(main)
