"""``config.json`` of a checkpoint of BERT's family."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from aquant_jax.errors import InputError

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
}
# Fields that tell architectures apart: the default of each, and its only supported value.
_SERVED = {
    "model_type": (None, "bert"),
    "position_embedding_type": ("absolute", "absolute"),
    "is_decoder": (False, False),
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The fields of ``config.json`` that the encoder and its heads depend on."""

    vocab_size: int = 30_522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3_072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02


def read_config(folder: str | Path) -> BertConfig:
    """Reads ``config.json``.

    Raises:
        InputError: there is none, or it describes another architecture, or one that is not
            supported: relative positions, an unknown activation function.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is not a checkpoint of BERT: there is no config.json in it")
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds no names and values")
    for name, (default, served) in _SERVED.items():
        if (value := fields.get(name, default)) != served:
            raise InputError(f"{path}: {name} is {value!r}; only {served!r} is supported")
    known = {field.name: field.type for field in dataclasses.fields(BertConfig)}
    for name in known.keys() & fields.keys():
        _check_field(path, name, fields[name], known[name])
    config = BertConfig(**{name: fields[name] for name in known.keys() & fields.keys()})
    if config.hidden_act not in ACTIVATIONS:
        raise InputError(
            f"{path}: hidden_act is {config.hidden_act!r}; there are {', '.join(ACTIVATIONS)}"
        )
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"{path}: hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
            f"{config.num_attention_heads}"
        )
    return config


def _check_field(path: Path, name: str, value: Any, kind: Any) -> None:
    """InputError unless the value of a field is of its kind."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    wanted, good = {
        int: ("a positive integer", number and isinstance(value, int) and value > 0),
        float: ("a number of 0 or more", number and value >= 0),
        str: ("a name", isinstance(value, str)),
    }[kind]
    if not good:
        raise InputError(f"{path}: {name} is {value!r}, not {wanted}")
