"""An archive that somebody altered and signed again is one line that names the file, or is read."""

import json
import os
import shutil
import signal
import socket
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.errors import InputError
from aquant_jax.layers.fake_quant import LayerState
from aquant_jax.reconstruction.block_store import BlockResult, BlockStore
from aquant_jax.reconstruction.report import BlockReport
from aquant_jax.storage import archive, manifest
from tests.storage import forge

ARRAYS = {"codes": np.arange(6, dtype=np.uint8).reshape(2, 3), "scale": np.ones(2, np.float32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("malformed") / "saved"
    archive.write(path, ARRAYS, {"a": 1}, {"program": b"abc"}, {"codes": 3})
    return path


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """A block store with one block of one layer."""
    store = BlockStore(tmp_path_factory.mktemp("blocks"), None, {"seed": 1}, None)
    two, path = jnp.ones(2), "head/kernel"
    layer = LayerState(jnp.ones((3, 2), jnp.uint8), two, two, two, {"b0": jnp.ones((1, 3))})
    curves = np.zeros((1, 2), np.float32), np.zeros((16, 4), np.float32)
    report = BlockReport(0, "head", (path,), 2, curves[0], 1.0, np.nan, False, 0.5, curves[1])
    activations = {path: ActivationQuantizer(jnp.float32(1), jnp.float32(0))}
    store.write(0, BlockResult({path: layer}, activations, report))
    return store


def outcome(read, argument):
    """The message of a refusal, which is one short line, and None; or None and what is read."""
    try:
        return None, read(argument)
    except InputError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < 700
    return message, None


def refusal(read, argument):
    return outcome(read, argument)[0]


def test_any_index_is_one_line_or_read(folder):
    refused = []
    for name, content in forge.sample(forge.mutations(folder), 80):
        with forge.altered(folder, archive.INDEX, content):
            refused.append(refusal(archive.read, folder))
            assert refused[-1] is None or str(folder) in refused[-1], name
    assert sum(message is not None for message in refused) > 0.8 * len(refused)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff\xfe{}", b"[" * 100_000, b"1" * 5000, b"[]", b"null", b'{"layout": 3}',
        b'{"layout": 3, "metadata": {}, "arrays": [["a", "object", [1], null]]}',
        b'{"layout": 3, "metadata": {}, "arrays": [["a", "float32,float32", [1], null]]}',
        b'{"layout": 3, "metadata": {}, "arrays": [["a", "uint8", [0, 1e400], null]]}',
        b'{"layout": 3, "metadata": [], "arrays": [["a", "uint8", [11], null]]}',
        b'{"layout": 3, "metadata": {}, "arrays": [["a", "uint8", [-11], null]]}',
        b'{"layout": 3, "metadata": {}, "arrays": [["a", "uint8", [true], null]]}',
        b'{"layout": 3, "metadata": {}, "arrays": [["a", "uint8", [9], 9]]}',
        b'{"layout": 3, "metadata": {}, "arrays": [["a", "int32", [22], 4]]}',
        b'{"layout": 3, "metadata": {}, '
        b'"arrays": [["a", "uint8", [11], null], ["a", "uint8", [0], null]]}',
    ],
)  # fmt: skip
def test_bytes_that_are_no_index_are_one_line(folder, content):
    with forge.altered(folder, archive.INDEX, content):
        assert f"{folder}/index.json is malformed: " in refusal(archive.read, folder)


@pytest.mark.parametrize("shape", [[10**12], [10**6, 10**6], [10**400], [2**40, 2**40]])
def test_a_declared_size_is_compared_before_memory_is_taken(folder, shape):
    content = json.loads((folder / archive.INDEX).read_text())
    altered = forge.index_with(content, ("arrays", 1, 2), shape)
    with forge.altered(folder, archive.INDEX, altered):
        message = refusal(archive.read, folder)
    assert message.startswith(
        f"{folder}/arrays is malformed: ValueError: {archive.INDEX} declares "
    )


def store_payload(folder, metadata, chunk):
    """Replaces the stored array, and signs."""
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/arrays/"}}
    kvstore = tensorstore.KvStore.open(store).result()
    known = json.loads(kvstore[b"payload/.zarray"])
    kvstore[b"payload/.zarray"] = json.dumps(known | metadata).encode()
    kvstore[b"payload/0"] = chunk
    forge.sign(folder)


@pytest.mark.parametrize(
    ("metadata", "chunk"),
    [
        ({"shape": [10**12], "chunks": [10**12]}, bytes(11)),
        ({"chunks": [10**12]}, bytes(11)),
        ({"compressor": {"id": "zlib", "level": 9}}, zlib.compress(bytes(11))),
        ({"dtype": "<f8"}, bytes(88)),
        ({}, bytes(10)),
        ({}, bytes(12)),
        ({"shape": None}, bytes(11)),
    ],
)
def test_another_payload_is_one_line(folder, tmp_path, metadata, chunk):
    path = tmp_path / "saved"
    shutil.copytree(folder, path)
    store_payload(path, {}, bytes(11))
    assert not archive.read(path).arrays["codes"].any()
    store_payload(path, metadata, chunk)
    assert f"{path}/arrays is malformed: " in refusal(archive.read, path)


def test_any_file_of_the_arrays_is_one_line_or_read(folder):
    names = [name for name in archive.sizes(folder) if name.startswith("arrays/")]
    for name in names:
        content = (folder / name).read_bytes()
        for other in (b"", content[:-1], content + b"x"):
            with forge.altered(folder, name, other):
                message = refusal(archive.read, folder)
                assert message is None or f"{folder}/arrays is malformed: " in message


@pytest.mark.parametrize("digests", [[], {"index.json": 1}, {"index.json": "\n"}, None, "x"])
def test_a_manifest_without_digests_is_damaged(folder, digests):
    with forge.altered(folder, manifest.MANIFEST, b""):
        (folder / manifest.MANIFEST).write_text(manifest.manifest_of(digests))
        assert f"{folder}/manifest.json is damaged" in refusal(archive.read, folder)


def test_a_name_of_several_lines_is_told_in_one(folder, tmp_path):
    path = tmp_path / "saved"
    shutil.copytree(folder, path)
    (path / "a\nb").touch()
    assert r"a\nb' does not belong" in refusal(archive.read, path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


NODES = {
    "FIFO": (os.mkfifo, "p"),
    "socket": (make_socket, "s"),
    "link to a file": (lambda path: path.symlink_to("/etc/hostname"), "l"),
    "link to a folder": (lambda path: path.symlink_to("/etc"), "l"),
    "link to nothing": (lambda path: path.symlink_to("nothing"), "l"),
}
PLACES = ("program", "manifest.json", "index.json", "arrays/d/new")


@pytest.fixture
def alarm():
    """Ends a test that blocks, as one does that opens a FIFO to which nobody writes."""

    def ring(*_):
        raise TimeoutError("the test blocks")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, "new") for kind in NODES] + [("FIFO", name) for name in PLACES]
)
def test_links_fifos_and_sockets_are_refused_before_they_are_opened(
    folder, tmp_path, alarm, kind, name
):
    path = tmp_path / "saved"
    shutil.copytree(folder, path)
    (path / name).unlink(missing_ok=True)
    make, mode = NODES[kind]
    make(path / name)
    message = refusal(archive.read, path)
    assert message.startswith(f"{path / name} is neither a file nor a folder: {mode}")


def test_a_link_to_a_whole_archive_is_read(folder, tmp_path):
    (tmp_path / "latest").symlink_to(folder)
    assert archive.read(tmp_path / "latest").metadata == {"a": 1}


def test_any_block_is_one_line_or_a_block(blocks):
    folder = blocks.path / "000"
    assert np.isnan(blocks.read(0).report.final_error)
    for name, content in forge.sample(forge.mutations(folder, ("call",)), 60):
        with forge.altered(folder, archive.INDEX, content):
            message, block = outcome(blocks.read, 0)
        if block is None:
            assert str(folder) in message, name
            continue
        assert all(isinstance(layer, LayerState) for layer in block.layers.values()), name
        assert {type(a) for a in block.activations.values()} <= {ActivationQuantizer}, name
        assert (type(block.report.steps), type(block.report.final_error)) == (int, float), name


def test_a_block_with_other_layers_is_one_line(blocks):
    folder = blocks.path / "000"
    content = json.loads((folder / archive.INDEX).read_text())
    for place, value, told in (
        (("metadata", "borders"), {}, "no place or no array for"),
        (("metadata", "activations"), [], "no place or no array for"),
        (("metadata", "report", "steps"), True, "steps is True; it must be of type"),
        (("metadata", "report", "name"), None, "name is None; it must be of type"),
    ):
        with forge.altered(folder, archive.INDEX, forge.index_with(content, place, value)):
            message = refusal(blocks.read, 0)
            assert f"{folder}/index.json is malformed: " in message
            assert told in message
