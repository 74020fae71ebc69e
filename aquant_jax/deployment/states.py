"""Deployed states by path, of which those of the steps of a loop are stored as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class States(Mapping[str, Any]):
    """States by path (a pytree).

    A program that loops over states takes them stacked. They are stored so, because every array of
    a pytree is an argument of the programs that it is given to.

    Attributes:
      arrays: states by path, and those of every stack, along a leading axis, by its label.
      stacks: the paths of every stack, by its label.
    """

    def __init__(self, arrays: Any, stacks: Mapping[str, tuple[str, ...]]) -> None:
        self.arrays, self.stacks = arrays, stacks
        self._places = {
            path: (label, index)
            for label, paths in self.stacks.items()
            for index, path in enumerate(paths)
        }

    def __getitem__(self, path: str) -> Any:
        if path not in self._places:
            return self.arrays[path]
        label, index = self._places[path]
        return jax.tree.map(lambda array: array[index], self.arrays[label])

    def __iter__(self) -> Iterator[str]:
        for name in self.arrays:
            yield from self.stacks.get(name, (name,))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _flatten(states: States) -> tuple[tuple[tuple[Any, Any]], Any]:
    return ((jax.tree_util.GetAttrKey("arrays"), states.arrays),), tuple(states.stacks.items())


def _unflatten(stacks: Any, children: Iterable[Any]) -> States:
    (arrays,) = children
    return States(arrays, dict(stacks))


jax.tree_util.register_pytree_with_keys(States, _flatten, _unflatten)


def store_stacked(states: Mapping[str, Any], stacks: Iterable[Sequence[str]]) -> Mapping[str, Any]:
    """States of which those of each of `stacks` are stored stacked.

    Args:
      states: by path.
      stacks: paths of states of the same structure. One that has a path twice, or a path of an
        earlier one, is left out.

    Raises:
      ValueError: states that do not stack.
    """
    arrays, made = dict(states), {}
    for paths in map(tuple, stacks):
        if len(set(paths)) == len(paths) and arrays.keys() >= set(paths):
            made[_label(paths)] = paths
            arrays[_label(paths)] = _stack([arrays.pop(path) for path in paths])
    return States(arrays, made) if made else states


def read_stacked(states: Mapping[str, Any], paths: tuple[str, ...]) -> Any:
    """The states of `paths`, along a leading axis of their arrays."""
    if isinstance(states, States) and states.stacks.get(_label(paths)) == paths:
        return states.arrays[_label(paths)]
    return _stack([states[path] for path in paths])


def stacks_of(states: Mapping[str, Any]) -> list[list[str]]:
    """The paths of every stack that is stored."""
    return [list(paths) for paths in states.stacks.values()] if isinstance(states, States) else []


def on_host(states: Mapping[str, Any]) -> dict[str, Any]:
    """Every state by its path, in numpy arrays."""
    return dict(jax.tree.map(np.asarray, states).items())


def _label(paths: tuple[str, ...]) -> str:
    return f"{paths[0]} to {paths[-1]}"


def _stack(states: Sequence[Any]) -> Any:
    """In one operation where the arrays have an axis, and not in one more for each."""

    def stack(*arrays: Any) -> jax.Array:
        if not np.ndim(arrays[0]):
            return jnp.stack(arrays)
        return jnp.concatenate(arrays).reshape(len(arrays), *arrays[0].shape)

    return jax.tree.map(stack, *states)
