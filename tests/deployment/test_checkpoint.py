"""What is saved is what is deployed: packed, complete, and nothing that can run code."""

import functools
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import aquant_jax as aq
import gpu_ops
from aquant_jax.arithmetic import border
from aquant_jax.deployment import checkpoint, stablehlo
from aquant_jax.errors import InputError
from aquant_jax.storage import archive
from tests.support.nets import assert_same_network, images, normal, rng_of, small_net
from tests.support.process import REPOSITORY, run_python


class NetOutput(NamedTuple):
    logits: jax.Array


X = images(0, 8, size=5)
COMPILER = aq.Compiler(gpu_ops.backend())


@functools.cache
def quantized(bits=3, border_format="float32", granularity="element"):
    """Weights of `bits`, of 4 and of 8 bits."""
    apply, variables = small_net()
    overrides = ({"pattern": "block_1/conv1", "weight_bits": 4},)
    recipe = aq.recipes.aquant(
        bits, bits, steps=2, batch_size=4,
        border_format=border_format, border_granularity=granularity, border_lr=0.02,
        overrides=overrides,
    )  # fmt: skip
    return aq.quantize(apply, variables, X, recipe, observer=aq.Observer(), compiler=COMPILER)


@pytest.mark.parametrize(
    ("bits", "border_format", "granularity"),
    [
        (3, "float32", "element"), (3, "int8", "element"), (3, "float32", "channel"),
        pytest.param(2, "float16", "element", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_restores_codes_and_outputs_bit_for_bit(tmp_path, bits, border_format, granularity):
    one = quantized(bits, border_format, granularity)
    aq.save(one, tmp_path / "saved")
    two = aq.restore(tmp_path / "saved")
    assert_same_network(one, two)
    for x, run in ((X[:1], jax.jit(two)), (np.concatenate([X, X[:3]]), two)):
        np.testing.assert_array_equal(run(x), one(x))
    assert two.recipe == one.recipe
    for left, right in zip(two.summary(), one.summary(), strict=True):
        assert str(left) == str(right)


def test_what_was_restored_can_be_saved(tmp_path):
    aq.save(quantized(3, "int8"), tmp_path / "one")
    aq.save(aq.restore(tmp_path / "one"), tmp_path / "two")
    one, two = (archive.read(tmp_path / name) for name in ("one", "two"))
    assert one.metadata == two.metadata
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, two.arrays[name])
    assert_same_network(aq.restore(tmp_path / "two"), quantized(3, "int8"))


def tokens_net():
    rng = rng_of(3)
    variables = {"table": normal(rng, 7, 6), "head": {"kernel": normal(rng, 6, 3)}}

    def apply(variables, x):
        mean = jnp.mean(variables["table"][x["ids"]], axis=1) * jnp.float32(2)
        return {"logits": jnp.tanh(mean) @ variables["head"]["kernel"], "mean": mean}

    ids = rng.integers(0, 7, (8, 4)).astype(np.int32)
    return apply, variables, {"ids": ids}


def test_trees_integers_and_static_arrays(tmp_path):
    apply, variables, x = tokens_net()
    one = aq.quantize(apply, variables, x, aq.recipes.nearest(batch_size=8), observer=aq.Observer())
    longer = {"ids": jax.ShapeDtypeStruct((1, 9), np.int32)}
    aq.save(one, tmp_path / "saved", longer)
    two = aq.restore(tmp_path / "saved")
    assert_same_network(one, two)
    ids = {"ids": np.arange(18, dtype=np.int32).reshape(2, 9) % 7}
    jax.tree.map(np.testing.assert_array_equal, two(ids), one(ids))
    with pytest.raises(InputError, match="does not take this input"):
        two(x)


def test_runs_where_the_code_of_the_model_is_not(tmp_path):
    one = quantized()
    aq.save(one, tmp_path / "saved")
    np.save(tmp_path / "x.npy", X)
    done = run_python(
        f"""
import numpy as np, sys
import aquant_jax as aq
network = aq.restore({str(tmp_path / "saved")!r})
np.save({str(tmp_path / "y.npy")!r}, network(np.load({str(tmp_path / "x.npy")!r})))
models = [name for name in sys.modules if name.startswith(("aquant_jax.models", "tests"))]
print(models, "gpu_ops" in sys.modules)
"""
    )
    assert done.stdout == "[] False\n", done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), one(X))


def test_the_payload_is_its_bits(tmp_path):
    one = quantized(2, "float16")
    aq.save(one, tmp_path / "saved")
    bits = {spec.path: spec.weight_bits for spec in one.specs}
    expected = 0
    for path, layer in one.layers.items():
        channels, taps = layer.scale.size, sum(b.size for b in layer.border.values())
        expected += bits[path] * (layer.codes.size + channels) + 32 * 2 * channels + 16 * taps
    expected += sum(32 + 8 for _ in one.activations)
    found = checkpoint.sizes(one)
    assert 0 <= found.packed - expected / 8 < 2 * len(bits)  # whole bytes
    payload = archive.read_payload(tmp_path / "saved")
    assert payload.nbytes == found.packed


def test_summary_prints_what_each_part_takes(capsys):
    found = aq.summary(quantized(2, "float16"))
    text = capsys.readouterr().out
    assert str(found) in text
    assert f"packed {found.packed:,}" in text
    _, variables = small_net()
    kernels = [variables["stem"], *variables["block_1"].values(), variables["head"]]
    weights = sum(own["kernel"].size for own in kernels)
    assert found.floating == 4 * weights + found.biases
    # Three coefficients of two bytes for 12, 16, 16 and 4 column elements; the stem's input is
    # the image, which stays float.
    assert found.borders == 3 * 2 * (16 + 16 + 4)
    assert f"borders add {100 * found.borders / (found.packed - found.borders):.2f}%" in text


@pytest.mark.parametrize("border_format", ["float16", "int8"])
def test_borders_are_rounded_before_they_are_scored(border_format):
    exact, rounded = quantized(), quantized(3, border_format)
    one, two = (np.asarray(q.layers["block_1/conv1/kernel"].border["b0"]) for q in (exact, rounded))
    assert np.any(one != two)
    assert np.abs(one - two).max() <= np.abs(one).max() / 127
    if border_format == "float16":
        np.testing.assert_array_equal(two, two.astype(np.float16))
    else:
        assert len(np.unique(two)) < len(np.unique(one))


def quantize_dense(apply):
    kernel = normal(rng_of(0), 75, 4)
    recipe = aq.recipes.nearest(batch_size=4)
    return aq.quantize(apply, {"kernel": kernel}, X, recipe, observer=aq.Observer())


def test_a_network_that_asks_for_a_size_runs_in_batches(tmp_path):
    one = quantize_dense(lambda variables, x: x.reshape(len(x), -1) @ variables["kernel"])
    aq.save(one, tmp_path / "saved")
    two = aq.restore(tmp_path / "saved")
    assert two.program.batch == 4
    for count in (1, 4, 7):
        # Sums of another order; the outputs are of size 10.
        np.testing.assert_allclose(two(X[:count]), one(X[:count]), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="an empty batch; the program takes 4 samples"):
        two(X[:0])


def test_a_network_that_cannot_run_in_batches_is_told(tmp_path):
    def apply(variables, x):
        return x.reshape(len(x), -1) @ variables["kernel"], variables["kernel"]

    one = quantize_dense(apply)
    with pytest.raises(InputError, match=r"symbolic .*_DimExpr.* nor run in batches"):
        aq.save(one, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_is_another_for_other_sizes_is_told():
    def apply(variables, x):
        y = x.reshape(len(x), -1) @ variables["kernel"]
        return y if len(x) < 100 else y @ variables["kernel"][:4]

    one = quantize_dense(apply)
    with pytest.raises(InputError, match=r"for those it was calibrated on: kernel#2"):
        one(np.concatenate([X] * 13))


def test_what_is_read_off_a_sequence_has_one_name_for_any_number_of_samples(tmp_path):
    # x[:, 0] is a slice where sizes are known, a gather where the number of samples is a symbol.
    rng = rng_of(1)
    variables = {name: normal(rng, 3, 3) for name in ("one", "two")}

    def apply(variables, x):
        return jnp.tanh(x @ variables["one"])[:, 0] @ variables["two"]

    x = normal(rng, 8, 5, 3)
    recipe = aq.recipes.nearest(batch_size=8, activations=("activation",), init_samples=8)
    one = aq.quantize(apply, variables, x, recipe, observer=aq.Observer())
    aq.save(one, tmp_path / "saved")
    two = aq.restore(tmp_path / "saved")
    assert two.program.batch is None
    np.testing.assert_array_equal(two(x[:3]), one(x[:3]))


def test_a_network_with_a_backend_is_saved_without_it(tmp_path):
    one = quantized()
    aq.save(one.with_backend(gpu_ops.backend()), tmp_path / "saved")
    two = aq.restore(tmp_path / "saved")
    np.testing.assert_array_equal(two(X), one(X))
    with pytest.raises(InputError, match="runs the program that it was saved with"):
        two.with_backend(gpu_ops.backend())(X)


def forged(path, program):
    """A checkpoint whose checksums are right and whose program is another."""
    aq.save(quantized(), path)
    stored = archive.read(path)
    blob = bytes(program.serialize())
    metadata = stored.metadata | {"program_bytes": len(blob)}
    other = path.with_name("forged")
    archive.write(other, stored.arrays, metadata, {checkpoint.PROGRAM: zlib.compress(blob)})
    return other


def test_a_program_that_calls_a_library_is_not_run(tmp_path):
    def calls(state, x):
        return jax.ffi.ffi_call("somebodys_code", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    checks = [export.DisabledSafetyCheck.custom_call("somebodys_code")]
    program = export.export(jax.jit(calls), disabled_checks=checks)({}, X)
    with pytest.raises(InputError, match="the program calls somebodys_code, which is not part"):
        aq.restore(forged(tmp_path / "saved", program))


@pytest.mark.parametrize("name", ["somebodys_code", "some::code"])
def test_calls_of_a_library_are_seen_whatever_their_names(tmp_path, name):
    def calls(x):
        return jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    checks = [export.DisabledSafetyCheck.custom_call(name)]
    program = export.export(jax.jit(calls), disabled_checks=checks)(X)
    with pytest.raises(InputError, match=f"the program calls {name}, which is not part of XLA"):
        stablehlo.check_program(tmp_path, program)


def test_a_network_that_restore_would_refuse_is_not_saved(tmp_path):
    one = quantize_dense(
        lambda v, x: jnp.linalg.inv((x.reshape(x.shape[0], -1) @ v["kernel"]).reshape(-1, 2, 2))
    )
    with pytest.raises(InputError, match=r"the program calls .*getrf"):
        aq.save(one, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_one_line(tmp_path):
    def calls_back(variables, x):
        y = x.reshape(x.shape[0], -1) @ variables["kernel"]
        return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(y.shape, y.dtype), y)

    def own_class(variables, x):
        return NetOutput(x.reshape(x.shape[0], -1) @ variables["kernel"])

    for apply, message in (
        (calls_back, "the program calls xla_|cannot be exported"),
        (own_class, "cannot be saved: "),
    ):
        with pytest.raises(InputError, match=message):
            aq.save(quantize_dense(apply), tmp_path / "saved")
        assert list(tmp_path.iterdir()) == []


def test_a_registered_border_is_restored_where_nobody_registered_it(tmp_path):
    aq.register_border("shifted", border.get("linear").init, border.get("linear").apply)
    try:
        apply, variables = small_net()
        recipe = aq.recipes.aquant(3, 3, steps=1, batch_size=4, border="shifted")
        one = aq.quantize(apply, variables, X, recipe, observer=aq.Observer())
        aq.save(one, tmp_path / "saved")
        expected = one(X)
    finally:
        del border.BORDERS["shifted"]
    np.testing.assert_array_equal(aq.restore(tmp_path / "saved")(X), expected)


def test_the_code_reads_no_pickle():
    for path in (REPOSITORY / "aquant_jax").rglob("*.py"):
        if path.parent.name != "models":  # whose reader of PyTorch files takes tensors alone
            assert "import pickle" not in path.read_text(), path


@pytest.mark.parametrize(
    ("layout", "writer"), [(1, "aquant-jax 0.1.0"), (2, "an earlier aquant-jax 0.2.0.dev0")]
)
def test_a_network_of_an_earlier_layout_names_its_version(layout, writer):
    old = REPOSITORY / "tests" / "golden" / f"layout_{layout}" / "checkpoint"
    before = archive.sizes(old)
    with pytest.raises(InputError) as refused:
        aq.restore(old)
    assert str(refused.value) == (
        f"{old} has layout {layout}, written by {writer}; this version reads layout 3"
    )
    assert archive.sizes(old) == before


def test_another_layout_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "LAYOUT", 99)
    aq.save(quantized(), tmp_path / "saved")
    monkeypatch.undo()
    with pytest.raises(InputError, match="layout 99, written by another version of aquant-jax"):
        aq.restore(tmp_path / "saved")


def test_one_border_a_channel_takes_a_quarter_of_the_coefficients():
    """Two 2x2 convolutions and a dense head of four channels, of which the head stays."""
    each, channel = (checkpoint.sizes(quantized(granularity=g)) for g in ("element", "channel"))
    bytes_of_four_borders = 4 * 3 * np.float32().nbytes
    assert each.borders == (4 + 4 + 1) * bytes_of_four_borders
    assert channel.borders == (1 + 1 + 1) * bytes_of_four_borders
    assert each._replace(borders=0) == channel._replace(borders=0)


def test_every_array_has_a_role():
    roles = checkpoint.leaf_roles(quantized())
    assert roles.keys() == stablehlo.state_of(quantized()).keys()
    codes = roles["[0]['block_1/conv1/kernel'].codes"]
    assert (codes.part, codes.packed_bits, codes.whole) == ("codes", 4, False)
    zero_point = roles["[1]['head/kernel'].zero_point"]
    assert (zero_point.part, zero_point.packed_bits, zero_point.whole) == ("quantizers", None, True)


def test_a_restored_network_runs_under_vmap_and_says_that_it_has_no_gradient(tmp_path):
    recipe, x = aq.recipes.nearest(8, 8), normal(rng_of(0), 6, 4)
    one = aq.quantize(lambda v, x: x @ v["w"], {"w": x.T @ x}, x, recipe, observer=aq.Observer())
    aq.save(one, tmp_path / "saved")
    two = aq.restore(tmp_path / "saved")
    found = jax.vmap(two)(x.reshape(3, 2, 4)).reshape(6, 4)
    np.testing.assert_allclose(found, one(x), rtol=1e-5)
    with pytest.raises(InputError, match=r"^a restored network has no gradient"):
        jax.grad(lambda x: two(x).sum())(x)
