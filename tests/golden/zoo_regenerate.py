"""Golden logits of the zoo: ``python -m tests.golden.zoo_regenerate`` writes ``zoo.npz`` anew.

They are those of the PyTorch networks in ``tests/torch_zoo.py``, with random arrays that depend on
nothing but the array's name in the public checkpoints, so numpy alone makes the same ones.
"""

import zlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("zoo.npz")
SIZES = {"resnet20_cifar": (32, 32)}  # the others are no multiple of the total stride
EVERY = 5  # class that is stored


def random_array(name, shape):
    """An array of a state dict; batch norms get statistics that matter."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    leaf = name.rpartition(".")[2]
    if len(shape) > 1:
        array = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
    elif leaf in ("weight", "running_var"):
        array = rng.uniform(0.5, 1.5, shape)
    else:
        array = rng.normal(0, 0.3, shape)
    return array.astype(np.float32)


def images(name):
    """Two normalised images."""
    height, width = SIZES.get(name, (64, 72))
    return np.random.default_rng(1).normal(size=(2, height, width, 3)).astype(np.float32)


def stored(logits):
    """What of the logits is kept on file."""
    return logits[:, ::EVERY]


def main():
    from tests.support import torch_zoo

    logits = {n: torch_zoo.logits(n, random_array, images(n))[0] for n in torch_zoo.NETWORKS}
    np.savez_compressed(FILE, **{name: stored(value) for name, value in logits.items()})
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
