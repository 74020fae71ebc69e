"""Equinox: `eqx.partition` separates the arrays, which are quantized, from the rest.

python examples/equinox_model.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from absl import app, flags

import aquant_jax as aq
from aquant_jax import data

EPOCHS = flags.DEFINE_integer("epochs", 200, "full-batch steps of the float network")
STEPS = flags.DEFINE_integer("steps", 100, "of the reconstruction of a block")
PRESET = flags.DEFINE_string("preset", "aquant", "of the recipe")


def main(_):
    digits = data.load("digits")
    images, labels = digits.calibration(digits.train_size, 0)
    test_images, test_labels = digits.test()
    model = eqx.nn.MLP(64, 10, width_size=64, depth=2, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_array)

    def apply(arrays, x):
        return jax.vmap(eqx.combine(arrays, static))(x.reshape(len(x), -1))

    optimizer = optax.adam(1e-2)
    state = optimizer.init(arrays)

    @jax.jit
    def step(arrays, state):
        def loss(arrays):
            logits = apply(arrays, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(arrays), state)
        return optax.apply_updates(arrays, updates), state

    for _ in range(EPOCHS.value):
        arrays, state = step(arrays, state)
    bits = {"weight_bits": 4, "act_bits": 4}
    recipe = aq.recipes.preset(PRESET.value, **bits, steps=STEPS.value)
    network = aq.quantize(apply, arrays, images[:1024], recipe, observer=aq.Observer())

    def score(run):
        return 100 * float(jnp.mean(jnp.argmax(run(test_images), -1) == test_labels))

    print(f"float {score(lambda x: apply(arrays, x)):.2f}%, w4a4 {score(network):.2f}%")
    aq.summary(network)


if __name__ == "__main__":
    app.run(main)
