"""BERT and its family (Devlin et al. 2018): an encoder with a head, from a Hugging Face checkpoint.

A checkpoint is a folder with ``config.json`` and ``model.safetensors`` (or ``pytorch_model.bin``).
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.errors import InputError
from aquant_jax.models.bert_config import ACTIVATIONS, BertConfig, read_config
from aquant_jax.models.importers import fill, leaf_paths, to_flax_layout
from aquant_jax.models.reading import read

Batch = Mapping[str, jax.Array]
INPUTS = ("ids", "mask", "types")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_MASKED = -1e9
# Prefixes of heads, which a checkpoint may have for other tasks.
_HEADS = ("cls.", "pooler.", "classifier.")
_PREFIX = "bert."
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_TABLES = {"words": "word", "positions": "position", "types": "token_type"}
_OUTSIDE = {"norm": "embeddings.LayerNorm", "pooler": "pooler.dense", "classifier": "classifier"}
_INSIDE = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}


class Layer(nn.Module):
    """Self-attention and a feed-forward network, each normalised after its residual sum."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, train: bool = False) -> jax.Array:
        """Maps hidden states ``[N, L, C]``, given the bias ``[N, 1, 1, L]`` of the scores."""
        config = self.config
        norm = partial(nn.LayerNorm, epsilon=config.layer_norm_eps, use_fast_variance=False)
        dense = partial(nn.Dense, kernel_init=nn.initializers.normal(config.initializer_range))
        drop = nn.Dropout(config.hidden_dropout_prob, deterministic=not train)
        heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads

        def split(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], heads, size)

        query, key, value = (
            split(dense(config.hidden_size, name=name)(x)) for name in ("query", "key", "value")
        )
        scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / np.float32(size**0.5) + bias
        probabilities = nn.softmax(scores, axis=-1)
        probabilities = nn.Dropout(config.attention_probs_dropout_prob, deterministic=not train)(
            probabilities
        )
        mixed = jnp.einsum("nhqk,nkhd->nqhd", probabilities, value).reshape(x.shape)
        x = norm(name="attention_norm")(x + drop(dense(config.hidden_size, name="out")(mixed)))
        wide = ACTIVATIONS[config.hidden_act](dense(config.intermediate_size, name="up")(x))
        return norm(name="norm")(x + drop(dense(config.hidden_size, name="down")(wide)))


class Encoder(nn.Module):
    """Embeddings and layers."""

    config: BertConfig

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> jax.Array:
        """Hidden states ``[N, L, C]`` of ``ids``, ``mask`` and ``types``, all ``[N, L]``."""
        config = self.config

        def table(name: str, size: int) -> nn.Embed:
            init = nn.initializers.normal(config.initializer_range)
            return nn.Embed(size, config.hidden_size, embedding_init=init, name=name)

        ids = batch["ids"]
        positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        x = table("words", config.vocab_size)(ids)
        x = x + table("positions", config.max_position_embeddings)(positions)
        x = x + table("types", config.type_vocab_size)(batch["types"])
        x = nn.LayerNorm(epsilon=config.layer_norm_eps, use_fast_variance=False, name="norm")(x)
        x = nn.Dropout(config.hidden_dropout_prob, deterministic=not train)(x)
        bias = jnp.where(batch["mask"][:, None, None] > 0, np.float32(0), np.float32(_MASKED))
        for index in range(config.num_hidden_layers):
            x = Layer(config, name=f"layer_{index}")(x, bias, train)
        return x


class Bert(nn.Module):
    """An encoder with a head.

    Attributes:
        config: its sizes.
        labels: outputs of the classifier or regressor (1) on the pooled first token. None gives
            sentence embeddings: the mean of the hidden states without padding.
    """

    config: BertConfig
    labels: int | None = None

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> jax.Array:
        """Logits ``[N, labels]``, or embeddings ``[N, C]``."""
        config = self.config
        hidden = Encoder(config, name="encoder")(batch, train)
        if self.labels is None:
            mask = batch["mask"][..., None].astype(hidden.dtype)
            return jnp.sum(hidden * mask, 1) / jnp.maximum(jnp.sum(mask, 1), np.float32(1e-9))
        init = nn.initializers.normal(config.initializer_range)
        pooler = nn.Dense(config.hidden_size, kernel_init=init, name="pooler")
        pooled = nn.tanh(pooler(hidden[:, 0]))
        pooled = nn.Dropout(config.hidden_dropout_prob, deterministic=not train)(pooled)
        return nn.Dense(self.labels, kernel_init=init, name="classifier")(pooled)


def create(
    folder: str | Path, labels: int | None = None, seed: int | None = None
) -> tuple[Bert, Any]:
    """Builds a model and fills it from a checkpoint.

    Args:
        folder: of the checkpoint.
        labels: of the head; None gives embeddings of sentences.
        seed: of a new head (pooler and classifier, or the classifier alone), for training; None
            takes it from the checkpoint.

    Returns:
        The module and its variables, nested dicts of arrays.

    Raises:
        InputError: see `read_config` and `reading.read`; arrays that are missing or left over or
            of other shapes; a head of another number of labels.
    """
    model = Bert(read_config(folder), labels)
    shapes, path = abstract(model), weights_file(folder)
    state = {_renamed(name): array for name, array in read(path).items()}
    if labels is not None:
        state = _with_head(state, shapes, path, labels, model.config, seed)
    wanted = set(map(_name, leaf_paths(shapes)))
    state = {
        name: _to_flax(name, array) for name, array in state.items()
        if name in wanted or not name.startswith(_HEADS)
    }  # fmt: skip
    try:
        return model, fill(shapes, state, _name)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def abstract(model: Bert) -> Any:
    """Shapes and dtypes of the variables of a model."""
    batch = dict.fromkeys(INPUTS, jax.ShapeDtypeStruct((1, 2), np.int32))
    return jax.eval_shape(model.init, jax.random.key(0), batch)


def weights_file(folder: str | Path) -> Path:
    """The file of the weights in a checkpoint; InputError when there is none."""
    for name in WEIGHTS:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise InputError(f"{folder} has no weights: there is no {' or '.join(WEIGHTS)} in it")


def to_checkpoint(variables: Any) -> dict[str, np.ndarray]:
    """The arrays of a model under the names, and in the layout, of a checkpoint."""
    leaves = zip(map(_name, leaf_paths(variables)), jax.tree.leaves(variables), strict=True)
    # The transposition of a matrix is its own inverse.
    return {name: np.ascontiguousarray(_to_flax(name, np.asarray(leaf))) for name, leaf in leaves}


def check_inputs(config: BertConfig, batch: Mapping[str, np.ndarray]) -> None:
    """InputError for tokens beyond the tables of embeddings, which JAX would read as NaN.

    Args:
        config: of the model.
        batch: ``ids``, ``mask`` and ``types``, ``[N, L]``.
    """
    length = batch["ids"].shape[1]
    if length > config.max_position_embeddings:
        raise InputError(
            f"sequences of {length} tokens do not fit the {config.max_position_embeddings} "
            "positions of the model"
        )
    sizes = {"ids": config.vocab_size, "types": config.type_vocab_size}
    for name, size in sizes.items():
        low, high = int(batch[name].min(initial=0)), int(batch[name].max(initial=0))
        if low < 0 or high >= size:
            odd = low if low < 0 else high
            raise InputError(f"{name} holds {odd}; the model has a table of {size} for them")


def _with_head(
    state: dict[str, np.ndarray],
    shapes: Any,
    path: Path,
    labels: int,
    config: BertConfig,
    seed: int | None,
) -> dict[str, np.ndarray]:
    """The state with a head for `labels`: the checkpoint's, or a new one drawn from `seed`."""
    classifier = state.get("classifier.weight")
    if seed is not None:
        rng = np.random.default_rng(seed)
        state = {name: a for name, a in state.items() if not name.startswith("classifier.")}
        for leaf_path in leaf_paths(shapes):
            name = _name(leaf_path)
            if name.startswith(("classifier.", "pooler.")) and name not in state:
                size = labels if name.startswith("classifier.") else config.hidden_size
                matrix = rng.normal(0, config.initializer_range, (size, config.hidden_size))
                state[name] = (matrix if name.endswith("weight") else np.zeros(size)).astype("f4")
        return state
    if classifier is None:
        raise InputError(f"{path} has no classifier.weight: fine-tune it first (launch.finetune)")
    if classifier.ndim != 2 or len(classifier) != labels:
        matrix = classifier.ndim == 2
        outputs = len(classifier) if matrix else f"shape {classifier.shape} and not of"
        raise InputError(f"{path} has a head of {outputs} labels; the task needs {labels}")
    return state


def _renamed(name: str) -> str:
    """A name in the form of recent releases, without the encoder's prefix."""
    for old, new in _OLD_NAMES.items():
        name = name.replace(old, new)
    return name.removeprefix(_PREFIX)


def _name(path: tuple[str, ...]) -> str:
    """The checkpoint's name of a leaf: ``("params", "encoder", "layer_0", "up", "kernel")``."""
    *_, owner, module, leaf = path
    if module in _TABLES:
        return f"embeddings.{_TABLES[module]}_embeddings.weight"
    kind = "bias" if leaf == "bias" else "weight"
    if owner.startswith("layer_"):
        return f"encoder.layer.{owner.removeprefix('layer_')}.{_INSIDE[module]}.{kind}"
    return f"{_OUTSIDE[module]}.{kind}"


def _to_flax(name: str, array: np.ndarray) -> np.ndarray:
    return array if "embeddings." in name else to_flax_layout(array)
