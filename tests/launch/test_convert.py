"""Checkpoints of the public releases become ours; anything else is one line and exit code 2."""

import importlib.util
import os
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aquant_jax import models
from aquant_jax.errors import InputError
from aquant_jax.models import importers
from launch import convert
from tests.support import torch_zoo_states as states

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs PyTorch (aquant-jax[torch])"
)
MODEL = "resnet20_cifar"


@pytest.fixture
def variables():
    return models.create(MODEL, seed=5)[1]


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the program on a file in tmp_path: its exit code, output and error."""

    def run(source, target="out.safetensors", model=MODEL):
        argv = ["convert", f"--model={model}", f"--from={tmp_path / source}"]
        code = convert.main([*argv, f"--to={tmp_path / target}"])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def refused(result, *words):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert [word for word in words if word not in err] == []


def save_torch(path, content, **options):
    import torch

    def tensors(value):
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value.copy())
        return type(value)((k, tensors(v)) for k, v in value.items())

    torch.save(tensors(content), path, **options)


def same(name, path, variables):
    jax.tree.map(np.testing.assert_array_equal, models.create(name, path)[1], variables)


def test_the_public_efficientnet_lite0(shared_data, tmp_path, capsys):
    source = shared_data / "weights" / "efficientnet_lite0.safetensors"
    target = tmp_path / "lite0.safetensors"
    argv = ["convert", "--model=efficientnet_lite0", f"--from={source}", f"--to={target}"]
    assert convert.main(argv) == 0
    given, found = load_file(source), load_file(target)
    assert len(found) == len(given) == 247
    for theirs, ours in [
        ("_blocks.3._depthwise_conv.weight", "params.stage3_0.depthwise.kernel"),
        ("_fc.weight", "params.head.kernel"),
        ("_bn1.running_var", "batch_stats.last_bn.var"),
    ]:
        np.testing.assert_array_equal(found[ours], importers.to_flax_layout(given[theirs]))
    same("efficientnet_lite0", target, models.create("efficientnet_lite0", source)[1])


@needs_torch
class TestPyTorch:
    @pytest.mark.parametrize(
        ("name", "wrapper", "prefix"),
        [
            ("w.pth", None, ""),
            ("w.pt", None, "module."),
            ("w.pth.tar", "state_dict", "module."),
            ("w.bin", "model", ""),
        ],
    )
    def test_what_releases_wrap_around_is_taken_off(
        self, name, wrapper, prefix, tmp_path, run, variables
    ):
        content = OrderedDict(
            (prefix + key, value) for key, value in states.state_dict(MODEL, variables).items()
        )
        content[f"{prefix}bn1.num_batches_tracked"] = np.array(7)
        wrapped = content if wrapper is None else {wrapper: content, "optimizer": {}}
        save_torch(tmp_path / name, wrapped)
        code, out, _ = run(name)
        assert code == 0
        assert f"{MODEL}: {len(jax.tree.leaves(variables))} arrays" in out
        same(MODEL, tmp_path / "out.safetensors", variables)
        same(MODEL, tmp_path / name, variables)

    def test_the_old_format_of_pytorch(self, tmp_path, run, variables):
        state = states.state_dict(MODEL, variables)
        save_torch(tmp_path / "w.pth.tar", state, _use_new_zipfile_serialization=False)
        assert run("w.pth.tar")[0] == 0
        same(MODEL, tmp_path / "out.safetensors", variables)

    def test_half_precision(self, tmp_path, run, variables):
        import torch

        state = states.state_dict(MODEL, variables)
        half = {key: torch.from_numpy(value).bfloat16() for key, value in state.items()}
        torch.save(half, tmp_path / "w.pth")
        assert run("w.pth")[0] == 0
        found = load_file(tmp_path / "out.safetensors")
        assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
        kernel = variables["params"]["linear"]["kernel"]
        np.testing.assert_allclose(found["params.linear.kernel"], kernel, rtol=2**-7)

    @pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
    def test_a_pickle_that_wants_to_run_code_is_refused(self, new, tmp_path, run, variables):
        import torch

        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "exploded"),)

        content = {"model": Bomb(), "conv1.weight": torch.zeros(3)}
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=new)
        before = (tmp_path / "w.pth").read_bytes()
        refused(run("w.pth"), "w.pth is refused", "mkdir", "model.state_dict()")
        assert (tmp_path / "w.pth").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]

    @pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
    @pytest.mark.parametrize("part", [0, 1, 40, 0.5, 0.999])
    def test_a_truncated_file(self, new, part, tmp_path, run, variables):
        state, path = states.state_dict(MODEL, variables), tmp_path / "w.pth"
        save_torch(path, state, _use_new_zipfile_serialization=new)
        content = path.read_bytes()
        path.write_bytes(content[: part if isinstance(part, int) else int(part * len(content))])
        refused(run("w.pth"), "cannot read weights from", "w.pth as a PyTorch checkpoint: ")
        assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]

    def test_text_is_no_checkpoint(self, tmp_path, run):
        (tmp_path / "w.pth").write_text("hello world, no checkpoint")
        refused(run("w.pth"), "cannot read weights from", "as a PyTorch checkpoint: KeyError: 101")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ([1, 2], ["holds a list, and no state dict"]),
            ({"epoch": 3}, ["'epoch' is a int, not a tensor"]),
            ({"state_dict": {"conv1": {}}}, ["'conv1' is a dict, not a tensor"]),
        ],
    )
    def test_a_file_without_state_dict(self, content, words, tmp_path, run):
        import torch

        torch.save(content, tmp_path / "w.pth")
        refused(run("w.pth"), "w.pth", *words)

    def test_a_tensor_that_numpy_cannot_read(self, tmp_path, run):
        import torch

        torch.save({"conv1": torch.eye(2).to_sparse()}, tmp_path / "w.pth")
        refused(run("w.pth"), "conv1 is a tensor of torch.float32, torch.sparse_coo")


class TestRefusals:
    def test_pytorch_is_not_installed(self, tmp_path, run, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "torch", None)
        (tmp_path / "w.pth").write_bytes(b"PK")
        refused(run("w.pth"), "PyTorch is not installed", "pip install -e '.[torch]'")

    def test_bfloat16_in_safetensors(self, tmp_path, run, variables):
        """No refusal: it becomes float32 without PyTorch."""
        state = states.state_dict(MODEL, variables)
        half = {key: value.astype(jnp.bfloat16) for key, value in state.items()}
        save_file(half, tmp_path / "w.safetensors")
        assert run("w.safetensors")[0] == 0
        found = load_file(tmp_path / "out.safetensors")["params.linear.kernel"]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, half["linear.weight"].T.astype(np.float32))

    def test_a_truncated_safetensors_file(self, tmp_path, run, variables):
        path = tmp_path / "w.safetensors"
        importers.save(path, variables)
        path.write_bytes(path.read_bytes()[:-1])
        refused(run("w.safetensors"), "cannot read weights from", "w.safetensors as safetensors")

    def test_eight_bit_floats_in_safetensors(self, tmp_path, run):
        header = b'{"a":{"dtype":"F8_E5M2","shape":[1],"data_offsets":[0,1]}}'
        content = len(header).to_bytes(8, "little") + header + b"\0"
        (tmp_path / "w.safetensors").write_bytes(content)
        refused(run("w.safetensors"), "w.safetensors holds arrays that numpy cannot hold", "float8")

    def test_no_file(self, tmp_path, run):
        refused(run("w.pth"), "w.pth: there is no such file")
        (tmp_path / "w.pth").mkdir()
        refused(run("w.pth"), "w.pth: there is no such file")

    def test_whole_numbers_are_no_weights(self, tmp_path, run, variables):
        state = states.state_dict(MODEL, variables)
        state["linear.weight"] = state["linear.weight"].astype(np.int8)
        save_file(state, tmp_path / "w.safetensors")
        refused(run("w.safetensors"), "'linear.weight' is of int8")

    def test_a_foreign_checkpoint(self, tmp_path, run, variables):
        save_file(states.state_dict(MODEL, variables), tmp_path / "w.safetensors")
        refused(
            run("w.safetensors", model="regnetx_600mf"),
            "none is a name of this model in any layout (our own; BRECQ, QDrop; torchvision; timm)",
        )
        refused(
            run("w.safetensors", model="resnet18"),
            "w.safetensors, in the layout of BRECQ",
            "lack",
            "'layer2.0.downsample.1.running_mean' (128,)",
            "'layer1.2.bn1.bias' (16,)",
        )
        assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]

    @pytest.mark.parametrize("ours", [True, False])
    def test_another_number_of_classes(self, ours, tmp_path, run, variables):
        variables["params"]["linear"] = {
            "kernel": np.zeros((64, 100), np.float32), "bias": np.zeros(100, np.float32),
        }  # fmt: skip
        state = states.state_dict(MODEL, variables)
        path = tmp_path / "w.safetensors"
        importers.save(path, variables) if ours else save_file(state, path)
        refused(run("w.safetensors"), "linear.", "100 classes, and the model has 10")

    def test_values_that_are_not_finite(self, tmp_path, run, variables):
        bias = np.asarray(variables["params"]["linear"]["bias"]).copy()
        bias[3] = np.inf
        variables["params"]["linear"]["bias"] = bias
        importers.save(tmp_path / "w.safetensors", variables)
        refused(run("w.safetensors"), "w.safetensors: variables/params/linear/bias has 1 of 10")
        assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]

    def test_unknown_model(self, run):
        refused(run("w.pth", model="resnet19"), "unknown model 'resnet19'")


class TestWriting:
    @pytest.fixture(autouse=True)
    def source(self, tmp_path, variables):
        save_file(states.state_dict(MODEL, variables), tmp_path / "w.safetensors")

    def test_our_own_file_converts_to_itself(self, tmp_path, run):
        assert run("w.safetensors")[0] == 0
        assert run("out.safetensors", "again.safetensors")[0] == 0
        content = (tmp_path / "out.safetensors").read_bytes()
        assert (tmp_path / "again.safetensors").read_bytes() == content

    def test_another_file_is_not_overwritten(self, tmp_path, run):
        target = tmp_path / "out.safetensors"
        target.write_bytes(b"precious")
        refused(run("w.safetensors"), "out.safetensors exists and holds something else")
        assert target.read_bytes() == b"precious"
        target.unlink()
        assert run("w.safetensors")[0] == 0
        assert run("w.safetensors")[0] == 0  # the same again
        refused(run("w.safetensors", "w.safetensors"), "w.safetensors exists")

    @pytest.fixture
    def full_disk(self, monkeypatch):
        write = Path.write_bytes

        def half(path, content):
            write(path, content[: len(content) // 2])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", half)

    def test_a_device_stays(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(InputError, match="pipe cannot be written: it is a folder or a device"):
            importers.save(tmp_path / "pipe", {"a": np.zeros(2)})
        assert (tmp_path / "pipe").is_fifo()

    def test_a_full_disk_leaves_nothing_half_written(self, tmp_path, run, full_disk):
        refused(run("w.safetensors"), "out.safetensors cannot be written: No space left on device")
        assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]

    def test_a_checkpoint_stays_until_the_next_is_complete(self, tmp_path, variables, full_disk):
        before = (tmp_path / "w.safetensors").read_bytes()
        with pytest.raises(InputError, match=r"w\.safetensors cannot be written"):
            importers.save(tmp_path / "w.safetensors", variables)
        assert (tmp_path / "w.safetensors").read_bytes() == before

    def test_a_folder_that_is_missing(self, run):
        refused(run("w.safetensors", "no/out.safetensors"), "cannot be written: No such file")

    def test_another_suffix(self, run):
        refused(run("w.safetensors", "out.pth"), "must end in .safetensors")
