"""Flax linen: `model.apply` and the variables of `model.init` are all that `quantize` needs.

python examples/linen_model.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from absl import app, flags

import aquant_jax as aq
from aquant_jax import data

EPOCHS = flags.DEFINE_integer("epochs", 60, "full-batch steps of the float network")
STEPS = flags.DEFINE_integer("steps", 100, "of the reconstruction of a block")
PRESET = flags.DEFINE_string("preset", "aquant", "of the recipe")


class Net(nn.Module):
    """A small convolutional network with batch norm, which `quantize` folds."""

    @nn.compact
    def __call__(self, x, train=False):
        for width in (8, 16):
            x = nn.Conv(width, (3, 3), strides=2 if width == 16 else 1, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def train(model, images, labels, epochs):
    """The variables after full-batch Adam."""
    variables = model.init(jax.random.key(0), images[:1])
    optimizer = optax.adam(1e-2)
    state = optimizer.init(variables["params"])

    @jax.jit
    def step(variables, state):
        def loss(params):
            given = {**variables, "params": params}
            logits, updated = model.apply(given, images, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated

        gradients, updated = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradients, state)
        return {"params": optax.apply_updates(variables["params"], updates), **updated}, state

    for _ in range(epochs):
        variables, state = step(variables, state)
    return variables


def main(_):
    digits = data.load("digits")
    images, labels = digits.calibration(digits.train_size, 0)
    test_images, test_labels = digits.test()
    model = Net()
    variables = train(model, images, labels, EPOCHS.value)
    bits = {"weight_bits": 4, "act_bits": 4}
    recipe = aq.recipes.preset(PRESET.value, **bits, steps=STEPS.value)
    network = aq.quantize(model.apply, variables, images[:1024], recipe, observer=aq.Observer())

    def score(run):
        return 100 * float(jnp.mean(jnp.argmax(run(test_images), -1) == test_labels))

    print(f"float {score(lambda x: model.apply(variables, x)):.2f}%, w4a4 {score(network):.2f}%")
    aq.summary(network)


if __name__ == "__main__":
    app.run(main)
