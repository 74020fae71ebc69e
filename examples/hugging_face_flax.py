"""A Flax checkpoint of Hugging Face: its module takes a dict, and its output is a dataclass.

python examples/hugging_face_flax.py --checkpoint=FOLDER   (pip install "transformers<5")

Without a checkpoint, a small one with random weights is made, saved and read.
"""

import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from transformers import BertConfig, FlaxBertForSequenceClassification

import aquant_jax as aq

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "folder of a Flax BERT classifier")
STEPS = flags.DEFINE_integer("steps", 20, "of the reconstruction of a block")
PRESET = flags.DEFINE_string("preset", "aquant", "of the recipe")
LENGTH = 16


def load(folder):
    """The module and its parameters."""
    model = FlaxBertForSequenceClassification.from_pretrained(folder)
    return model.module, {"params": model.params}, model.config


def random_checkpoint(folder):
    """Saves a small model of random weights."""
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, initializer_range=0.15,
    )  # fmt: skip
    FlaxBertForSequenceClassification(config).save_pretrained(folder)
    return folder


def main(_):
    with tempfile.TemporaryDirectory() as folder:
        folder = CHECKPOINT.value or random_checkpoint(os.path.join(folder, "bert"))
        module, variables, config = load(folder)
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, LENGTH + 1, size=(256, 1))
    calibration = {
        "attention_mask": (np.arange(LENGTH) < lengths).astype(np.int32),
        "input_ids": rng.integers(0, config.vocab_size, (256, LENGTH)).astype(np.int32),
    }

    def apply(variables, batch):
        tokens, mask = batch["input_ids"], batch["attention_mask"]
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return module.apply(variables, tokens, mask, jnp.zeros_like(tokens), places, None).logits

    recipe = aq.recipes.preset(PRESET.value, weight_bits=8, act_bits=8, steps=STEPS.value)
    network = aq.quantize(
        apply, variables, calibration, recipe, mask="attention_mask", observer=aq.Observer()
    )
    exact = jax.jit(apply)(variables, calibration)
    error = jnp.linalg.norm(network(calibration) - exact) / jnp.linalg.norm(exact)
    print(f"logits: relative error {float(error):.4f}")
    aq.summary(network)


if __name__ == "__main__":
    app.run(main)
