"""Keras on JAX: `stateless_call` is the function, and a dict by `variable.path` its variables.

python examples/keras_model.py
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax.numpy as jnp
import keras
from absl import app, flags

import aquant_jax as aq
from aquant_jax import data

EPOCHS = flags.DEFINE_integer("epochs", 10, "passes over the training digits")
STEPS = flags.DEFINE_integer("steps", 100, "of the reconstruction of a block")
PRESET = flags.DEFINE_string("preset", "aquant", "of the recipe")


def main(_):
    digits = data.load("digits")
    images, labels = digits.calibration(digits.train_size, 0)
    test_images, test_labels = digits.test()
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.layers.Input((8, 8, 1)),
        keras.layers.Conv2D(16, 3, padding="same", use_bias=False),
        keras.layers.BatchNormalization(),
        keras.layers.ReLU(),
        keras.layers.Conv2D(32, 3, strides=2, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(10),
    ])  # fmt: skip
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    model.fit(images, labels, epochs=EPOCHS.value, verbose=0)

    trainable = [variable.path for variable in model.trainable_variables]
    others = [variable.path for variable in model.non_trainable_variables]
    variables = {variable.path: variable.value for variable in model.variables}

    def apply(variables, x):
        given = [[variables[path] for path in paths] for paths in (trainable, others)]
        return model.stateless_call(*given, x, training=False)[0]

    bits = {"weight_bits": 4, "act_bits": 4}
    recipe = aq.recipes.preset(PRESET.value, **bits, steps=STEPS.value)
    network = aq.quantize(apply, variables, images[:1024], recipe, observer=aq.Observer())

    def score(run):
        return 100 * float(jnp.mean(jnp.argmax(run(test_images), -1) == test_labels))

    print(f"float {score(lambda x: apply(variables, x)):.2f}%, w4a4 {score(network):.2f}%")
    aq.summary(network)


if __name__ == "__main__":
    app.run(main)
