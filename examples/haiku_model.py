"""Haiku: `apply` of a transformed function without random keys, and its parameters.

python examples/haiku_model.py   (pip install dm-haiku)
"""

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from absl import app, flags

import aquant_jax as aq
from aquant_jax import data

EPOCHS = flags.DEFINE_integer("epochs", 60, "full-batch steps of the float network")
STEPS = flags.DEFINE_integer("steps", 100, "of the reconstruction of a block")
PRESET = flags.DEFINE_string("preset", "aquant", "of the recipe")


def net(images):
    """A small network whose residual layers are a `layer_stack`: a scan, quantized by layers."""
    x = jax.nn.relu(hk.Conv2D(8, 3, stride=2)(images))
    x = jax.nn.relu(hk.Linear(32)(hk.Flatten()(x)))
    layer = hk.experimental.layer_stack(4)(lambda h: h + jax.nn.relu(hk.Linear(32)(h)))
    return hk.Linear(10)(layer(x))


def train(model, images, labels, epochs):
    """The parameters after full-batch Adam."""
    params = model.init(jax.random.key(0), images[:1])
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        def loss(params):
            logits = model.apply(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for _ in range(epochs):
        params, state = step(params, state)
    return params


def main(_):
    digits = data.load("digits")
    images, labels = digits.calibration(digits.train_size, 0)
    test_images, test_labels = digits.test()
    model = hk.without_apply_rng(hk.transform(net))
    params = train(model, images, labels, EPOCHS.value)
    recipe = aq.recipes.preset(PRESET.value, weight_bits=4, act_bits=4, steps=STEPS.value)
    network = aq.quantize(model.apply, params, images[:1024], recipe, observer=aq.Observer())

    def score(run):
        return 100 * float(jnp.mean(jnp.argmax(run(test_images), -1) == test_labels))

    print(f"float {score(lambda x: model.apply(params, x)):.2f}%, w4a4 {score(network):.2f}%")
    aq.summary(network)


if __name__ == "__main__":
    app.run(main)
