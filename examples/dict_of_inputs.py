"""A network of several inputs: the calibration set is a pytree, here a dict, and so is a batch.

python examples/dict_of_inputs.py
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

import aquant_jax as aq


def apply(params, batch):
    """A score of each user and item, and their embeddings: outputs may be a pytree too."""
    user = jax.nn.relu(batch["user"] @ params["user"]["kernel"])
    item = jax.nn.relu(batch["item"] @ params["item"]["kernel"])
    joint = jax.nn.relu(jnp.concatenate([user, item], -1) @ params["joint"]["kernel"])
    return {"score": joint @ params["score"]["kernel"], "user": user}


def main(_):
    rng = np.random.default_rng(0)
    shapes = {"user": (16, 32), "item": (24, 32), "joint": (64, 32), "score": (32, 1)}
    params = {
        name: {"kernel": rng.normal(0, (2 / shape[0]) ** 0.5, shape).astype(np.float32)}
        for name, shape in shapes.items()
    }
    calibration = {
        "user": rng.normal(size=(1024, 16)).astype(np.float32),
        "item": rng.normal(size=(1024, 24)).astype(np.float32),
    }
    network = aq.quantize(
        apply, params, calibration, aq.recipes.nearest(8, 8), observer=aq.Observer()
    )
    with tempfile.TemporaryDirectory() as folder:
        aq.save(network, Path(folder) / "quantized")
        restored = aq.restore(Path(folder) / "quantized")
    batch = jax.tree.map(lambda leaf: leaf[:8], calibration)
    for name, expected in apply(params, batch).items():
        error = jnp.linalg.norm(restored(batch)[name] - expected) / jnp.linalg.norm(expected)
        print(f"{name}: relative error {float(error):.4f}")
    aq.summary(restored)


if __name__ == "__main__":
    app.run(main)
