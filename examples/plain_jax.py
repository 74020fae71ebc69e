"""Plain JAX: any function of a pytree of arrays and a batch.

python examples/plain_jax.py
"""

import jax
import jax.numpy as jnp
from absl import app, flags

import aquant_jax as aq
from aquant_jax import data

EPOCHS = flags.DEFINE_integer("epochs", 200, "full-batch steps of the float network")
STEPS = flags.DEFINE_integer("steps", 100, "of the reconstruction of a block")
PRESET = flags.DEFINE_string("preset", "aquant", "of the recipe")


def init(key, sizes):
    """Weights and biases of dense layers of these sizes."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (i, o)) * (2 / i) ** 0.5, "b": jnp.zeros(o)}
        for k, i, o in zip(keys, sizes, sizes[1:], strict=False)
    ]


def apply(params, x):
    """Logits of flattened images."""
    x = x.reshape(len(x), -1)
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def main(_):
    digits = data.load("digits")
    images, labels = digits.calibration(digits.train_size, 0)
    test_images, test_labels = digits.test()
    params = init(jax.random.key(0), (64, 64, 64, 10))

    @jax.jit
    def step(params):
        def loss(params):
            logits = jax.nn.log_softmax(apply(params, images))
            return -jnp.take_along_axis(logits, labels[:, None], 1).mean()

        return jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(loss)(params))

    for _ in range(EPOCHS.value):
        params = step(params)
    bits = {"weight_bits": 3, "act_bits": 3}
    recipe = aq.recipes.preset(PRESET.value, **bits, steps=STEPS.value)
    network = aq.quantize(apply, params, images[:1024], recipe, observer=aq.Observer())

    def score(run):
        return 100 * float(jnp.mean(jnp.argmax(run(test_images), -1) == test_labels))

    print(f"float {score(lambda x: apply(params, x)):.2f}%, w3a3 {score(network):.2f}%")
    aq.summary(network)


if __name__ == "__main__":
    app.run(main)
