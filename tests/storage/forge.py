"""Archives that somebody altered and signed again: their checksums hold."""

import contextlib
import json

import numpy as np

from aquant_jax.storage import archive, manifest

# What a field of JSON may hold instead of what belongs there.
VALUES = (
    None, True, -1, 0.5, 9, 10**12, 10**400, float("nan"), "", "x\n\x1b[31m", "\ud800",
    [], {}, [[-1]], {"x": None},
)  # fmt: skip


def sign(folder):
    """Writes the manifest of what is in the folder now."""
    manifest.write_manifest(folder)


@contextlib.contextmanager
def altered(folder, name, content):
    """The folder with another content of a file, signed; afterwards it is as before."""
    file = folder / name
    before = file.read_bytes() if file.exists() else None
    try:
        file.write_bytes(content)
        sign(folder)
        yield
    finally:
        file.unlink() if before is None else file.write_bytes(before)
        sign(folder)


def places(value, path=()):
    """The path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


def index_without(content, path):
    """The bytes of an index that lacks a value."""
    return _changed(content, path, lambda parent, key: parent.pop(key))


def index_with(content, path, value):
    """The bytes of an index with another value."""
    return _changed(content, path, lambda parent, key: parent.__setitem__(key, value))


def mutations(folder, skipped=()):
    """Every mutation of an index, with a name: a value dropped, or replaced by one of VALUES."""
    content = json.loads((folder / archive.INDEX).read_text())
    for path in places(content):
        if not set(path) & set(skipped):
            yield f"{path} dropped", index_without(content, path)
            for value in VALUES:
                yield f"{path} = {value!r}", index_with(content, path, value)


def sample(cases, count):
    """Some of the cases, the same ones in each run."""
    cases = list(cases)
    chosen = np.random.default_rng(0).choice(len(cases), min(count, len(cases)), replace=False)
    return [cases[i] for i in sorted(chosen)]


def _changed(content, path, change):
    other = parent = json.loads(json.dumps(content))
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return json.dumps(other).encode()
