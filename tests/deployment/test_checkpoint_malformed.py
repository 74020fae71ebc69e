"""A saved network that somebody altered and signed again is one line, or a network that works."""

import contextlib
import dataclasses
import json
import tracemalloc
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import aquant_jax as aq
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.deployment import checkpoint, stablehlo
from aquant_jax.deployment.quantized import Quantized
from aquant_jax.errors import InputError
from aquant_jax.layers.fake_quant import LayerSpec, LayerState
from aquant_jax.recipe import Recipe
from aquant_jax.storage import archive
from tests.storage import forge

X = np.ones((2, 3), np.float32)
PATH = "head/kernel"
SKIPPED = ("device", "versions", "reconstruction")  # `restore` reads neither; the recipe has tests


def network():
    """A network of one layer with everything that is saved, and a program that reads its codes."""
    two = jnp.ones(2)
    codes = jnp.arange(6, dtype=jnp.uint8).reshape(3, 2)
    layer = LayerState(codes, two, two, two, {"b0": jnp.full((1, 3), 0.5)})
    spec = LayerSpec(PATH, "dense", 4, PATH, 4, "linear", "identity", "element")
    recipe = Recipe(border="linear", border_format="int8", overrides=({"pattern": "x"},))
    activations = {PATH: ActivationQuantizer(jnp.float32(0.5), jnp.float32(1))}

    def run(state, x):
        return x @ state[f"[0]['{PATH}'].codes"].astype(jnp.float32) + state["[2]['shift']"]

    one = Quantized({PATH: layer}, activations, {"shift": two}, None, (spec,), recipe)
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), stablehlo.state_of(one))
    x = jax.ShapeDtypeStruct((export.symbolic_shape("samples")[0], 3), np.float32)
    exported = export.export(jax.jit(run), platforms=stablehlo.PLATFORMS)(state, x)
    return dataclasses.replace(one, program=stablehlo.Exported(exported))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("malformed") / "saved"
    aq.save(network(), folder)
    return folder


def outcome(folder):
    """The message of a refusal, which is one short line that names a file, or None: it works."""
    try:
        restored = aq.restore(folder)
    except InputError as error:
        message = str(error)
    else:
        assert jax.eval_shape(restored, X).shape == (2, 2)
        assert len(restored.summary()) == 1
        assert checkpoint.sizes(restored).codes == 3
        return None
    assert message.isprintable()
    assert len(message) < 700
    assert message.startswith(f"{folder}")
    return message


def metadata_of(folder):
    return json.loads((folder / archive.INDEX).read_text())


@contextlib.contextmanager
def with_program(folder, content, size=None, compressed=None):
    """The folder with another program, whose size the index declares."""
    size = len(content) if size is None else size
    index = forge.index_with(metadata_of(folder), ("metadata", "program_bytes"), size)
    compressed = zlib.compress(content) if compressed is None else compressed
    with (
        forge.altered(folder, archive.INDEX, index),
        forge.altered(folder, checkpoint.PROGRAM, compressed),
    ):
        yield


def program_of(folder):
    return zlib.decompress((folder / checkpoint.PROGRAM).read_bytes())


def test_the_network_itself_works(saved):
    np.testing.assert_array_equal(aq.restore(saved)(X), [[7, 10]] * 2)
    assert outcome(saved) is None


def test_any_metadata_is_one_line_or_a_network_that_works(saved):
    refused = []
    for name, content in forge.sample(forge.mutations(saved, SKIPPED), 120):
        with forge.altered(saved, archive.INDEX, content):
            try:
                refused.append(outcome(saved) is not None)
            except Exception as error:
                raise AssertionError(name) from error
    assert sum(refused) > 0.8 * len(refused)


RECIPE = ("metadata", "recipe")
LAYER = ("metadata", "layers", 0)
EXPONENTS = ("metadata", "exponents")
BORDER = f"[0]['{PATH}'].border['b0']"


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("metadata", "program_bytes"), None, "declares program_bytes None"),
        ((*RECIPE, "colour"), 1, "unexpected keyword argument 'colour'"),
        ((*RECIPE, "reconstruction", "colour"), 1, "unknown field 'reconstruction.colour"),
        ((*LAYER, "colour"), 1, "unexpected keyword argument 'colour'"),
        ((*LAYER, "kind"), "conv3", "layer LayerSpec(path='head/kernel', kind='conv3'"),
        ((*LAYER, "weight_bits"), 5, "arrays do not match layers and program"),
        ((*LAYER, "weight_bits"), 9, "weight_bits=9"),
        ((*LAYER, "weight_bits"), True, "weight_bits is True; it must be of type int | None"),
        ((*LAYER, "act_bits"), 1, "act_bits=1"),
        ((*LAYER, "tensor"), "other", "tensor='other'"),
        ((*LAYER, "phi"), "other", "phi"),
        ((*LAYER, "border_granularity"), "tap", "border_granularity='tap'"),
        (("metadata", "layers"), [], "layers [], borders ['head/kernel']"),
        (("metadata", "activations"), [], "tensor='head/kernel'"),
        (("metadata", "stacks"), [[[PATH]], [], []], "arrays do not match layers and program"),
        (("metadata", "stacks"), [[]], "not enough values to unpack"),
        (("metadata", "stacks"), 3, "TypeError"),
        (("metadata", "constants"), ["shift", "more"], "no place or no array for"),
        (EXPONENTS, {}, "exponents is {}; it must have an int for each of"),
        ((*EXPONENTS, BORDER), 0.5, "it must have an int for each of"),
        ((*EXPONENTS, BORDER), [1], "it must have an int for each of"),
        ((*EXPONENTS, "more"), 1, "it must have an int for each of"),
        (("arrays", 7, 1), "int32", "int32[2]"),
        (("arrays", 7, 2), [2, 1], "float32[2, 1]"),
        (("arrays", 7, 0), "[2]['other']", "KeyError"),
    ],
)  # fmt: skip
def test_metadata_that_do_not_match_are_told(saved, place, value, told):
    content = forge.index_with(metadata_of(saved), place, value)
    with forge.altered(saved, archive.INDEX, content):
        message = outcome(saved)
    file = checkpoint.PROGRAM if "program_bytes" in place else archive.INDEX
    assert message.startswith(f"{saved}/{file} is malformed: ")
    assert told in message


def test_layers_that_are_listed_twice_are_told(saved):
    content = metadata_of(saved)
    content["metadata"]["layers"] *= 2
    with forge.altered(saved, archive.INDEX, json.dumps(content).encode()):
        assert "layers ['head/kernel', 'head/kernel'], borders ['head/kernel']" in outcome(saved)


def test_any_program_is_one_line_or_a_network_that_works(saved):
    # Outside of the bytecode: jaxlib's reader of it is C++, and may crash on altered bytes.
    content = program_of(saved)
    code = aq.restore(saved).program.program.mlir_module_serialized
    start = content.index(code)
    places = [*range(0, start, 61), *range(start + len(code), len(content), 61)]
    for place in places:
        for other in (b"\xff\xff\xff\x7f", b"\0\0\0\0"):
            with with_program(saved, content[:place] + other + content[place + 4 :]):
                outcome(saved)
    for end in (1, 4, start, start + 9, len(content) // 2):
        with with_program(saved, content[:end]):
            assert outcome(saved)


@pytest.mark.parametrize("compressed", [b"", b"junk", zlib.compress(b"junk")[:-1]])
def test_a_file_that_is_no_compressed_program_is_one_line(saved, compressed):
    with with_program(saved, b"", 4, compressed):
        assert outcome(saved).startswith(f"{saved}/{checkpoint.PROGRAM} is malformed: ")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (-1, "it holds more bytes"),
        (1, "it holds"),
        (2**31, "Error: index.json"),
        (0.0, "Error: index.json"),
    ],
)
def test_another_size_than_the_declared_one_is_told(saved, change, told):
    content = program_of(saved)
    with with_program(saved, content, len(content) + change):
        message = outcome(saved)
    assert message.startswith(f"{saved}/{checkpoint.PROGRAM} is malformed: ValueError: ")
    assert told in message
    assert f"program_bytes {len(content) + change}" in message


def test_bytes_behind_the_program_are_told(saved):
    content = program_of(saved)
    with with_program(saved, content, compressed=zlib.compress(content) + b"more"):
        assert "is malformed: ValueError: it holds" in outcome(saved)


def test_a_bomb_takes_no_memory(saved):
    stream = zlib.compressobj(1)
    bomb = b"".join(stream.compress(bytes(2**20)) for _ in range(128)) + stream.flush()
    assert len(bomb) < 2**20
    tracemalloc.start()
    with with_program(saved, b"", 4000, bomb):
        assert "it holds more bytes, index.json declares program_bytes 4000" in outcome(saved)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24


def exported(run, *arguments, vjp_order=0):
    return bytes(export.export(jax.jit(run))(*arguments).serialize(vjp_order=vjp_order))


def test_a_program_that_takes_other_arguments_is_told(saved):
    state = stablehlo.state_of(aq.restore(saved))
    for content, told in (
        (exported(lambda x: x, X), "malformed: ValueError: "),
        (exported(lambda state, x: x, [X], X), "it takes no state by name"),
        (exported(lambda state, x: x, {"a": X}, X), "arrays do not match layers and program"),
        (exported(lambda state, x: x, state, {}), "no input has a sample axis"),
        (exported(lambda state, x: x, state, 1.0), "no input has a sample axis"),
        (exported(lambda state, x: x, state, X, vjp_order=1), "or has a derivative"),
    ):
        with with_program(saved, content):
            assert told in outcome(saved)


def test_a_program_whose_code_takes_other_arguments_is_told(saved):
    known = aq.restore(saved).program.program
    code = b"module { func.func public @main(%x: V) -> V { return %x : V } }"
    code = code.replace(b"V", b"tensor<f32>")
    for other in (code, code.replace(b"main", b"other")):
        forged = dataclasses.replace(known, mlir_module_serialized=other)
        with with_program(saved, bytes(forged.serialize())):
            assert outcome(saved).startswith(f"{saved}/{checkpoint.PROGRAM} is malformed: ")


def test_an_archive_without_a_program_is_told(saved, tmp_path):
    archive.write(tmp_path / "block", {"a": X}, {})
    with pytest.raises(
        InputError, match=r"block is not a saved network: it has no program\.stable"
    ):
        aq.restore(tmp_path / "block")
