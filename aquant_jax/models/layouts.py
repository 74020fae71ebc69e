"""Names of the zoo's arrays in public PyTorch checkpoints: one table per family.

A table maps each of our modules to the release's names: ``conv: (conv, batch norm)``. Names of
modules in a block such as ``stage2_0`` follow the release's name of that block.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

Table = Mapping[str, tuple[str, ...]]

_BLOCK = re.compile(r"[a-z]+(\d+)_(\d+)")
_BATCH_NORM = "_bn"
# (collection, leaf) of ours -> PyTorch's name of the array in its module.
_TORCH_LEAF = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}


class Layout(NamedTuple):
    """The names in the checkpoints of one source.

    Attributes:
        source: who publishes such checkpoints.
        outside: the modules outside blocks.
        block: (stage from 1, index in the stage, index in the network) -> the block's name.
        inside: the modules inside a block.
        unexpanded: those of a block without ``expand``, where they differ.
    """

    source: str
    outside: Table
    block: Callable[[int, int, int], str]
    inside: Table
    unexpanded: Table | None = None

    def names(self, paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
        """The checkpoint's name of every leaf.

        Args:
            paths: of all leaves: ``("params", "stage1_0", "conv1", "kernel")``.

        Returns:
            Names by path: ``"layer1.0.conv1.weight"``.
        """
        paths = list(paths)
        blocks = sorted({(_numbers(p[1]), p[1]) for p in paths if len(p) == 4})
        flat = {block: index for index, (_, block) in enumerate(blocks)}
        expanded = {path[1] for path in paths if "expand" in path}
        return {path: self._name(path, flat, expanded) for path in paths}

    def _name(self, path: tuple[str, ...], flat: dict[str, int], expanded: set[str]) -> str:
        collection, *owner, module, leaf = path
        table, prefix = self.outside, ""
        if owner:
            (block,) = owner
            prefix = f"{self.block(*_numbers(block), flat[block])}."
            table = self.inside if block in expanded or not self.unexpanded else self.unexpanded
        conv = module.removesuffix(_BATCH_NORM)
        return f"{prefix}{table[conv][conv != module]}.{_TORCH_LEAF[collection, leaf]}"


def _numbers(block: str) -> tuple[int, int]:
    match = _BLOCK.fullmatch(block)
    assert match is not None, block
    return int(match[1]), int(match[2])


# nn.Sequential(conv, bn, relu, conv, bn, relu, conv, bn), and the same without the first three.
_FLAT = {"expand": ("0", "1"), "depthwise": ("3", "4"), "project": ("6", "7")}
_FLAT_UNEXPANDED = {"depthwise": ("0", "1"), "project": ("3", "4")}
# In torchvision every conv, bn and relu are a sequence of their own.
_NESTED = {"expand": ("0.0", "0.1"), "depthwise": ("1.0", "1.1"), "project": ("2", "3")}
_NESTED_UNEXPANDED = {"depthwise": ("0.0", "0.1"), "project": ("1", "2")}

_TIMM_MOBILE = Layout(
    "timm",
    {
        "stem": ("conv_stem", "bn1"),
        "last": ("conv_head", "bn2"),
        "head": ("classifier",),
    },
    lambda stage, index, _: f"blocks.{stage - 1}.{index}",
    {"expand": ("conv_pw", "bn1"), "depthwise": ("conv_dw", "bn2"), "project": ("conv_pwl", "bn3")},
    {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")},
)

RESNET_CIFAR = (
    Layout(
        "the public CIFAR ResNets",
        {"conv1": ("conv1", "bn1"), "linear": ("linear",)},
        lambda stage, index, _: f"layer{stage}.{index}",
        {"conv1": ("conv1", "bn1"), "conv2": ("conv2", "bn2")},
    ),
)

RESNET = (
    Layout(
        "BRECQ, QDrop, torchvision, timm",
        {"stem": ("conv1", "bn1"), "head": ("fc",)},
        lambda stage, index, _: f"layer{stage}.{index}",
        {
            "conv1": ("conv1", "bn1"),
            "conv2": ("conv2", "bn2"),
            "conv3": ("conv3", "bn3"),
            "shortcut": ("downsample.0", "downsample.1"),
        },
    ),
)

REGNET = (
    Layout(
        "BRECQ, QDrop",
        {"stem": ("stem.conv", "stem.bn"), "head": ("head.fc",)},
        lambda stage, index, _: f"s{stage}.b{index + 1}",
        {
            "conv1": ("f.a", "f.a_bn"),
            "conv2": ("f.b", "f.b_bn"),
            "conv3": ("f.c", "f.c_bn"),
            "shortcut": ("proj", "bn"),
        },
    ),
    Layout(
        "torchvision",
        {"stem": ("stem.0", "stem.1"), "head": ("fc",)},
        lambda stage, index, _: f"trunk_output.block{stage}.block{stage}-{index}",
        {
            "conv1": ("f.a.0", "f.a.1"),
            "conv2": ("f.b.0", "f.b.1"),
            "conv3": ("f.c.0", "f.c.1"),
            "shortcut": ("proj.0", "proj.1"),
        },
    ),
    Layout(
        "timm",
        {"stem": ("stem.conv", "stem.bn"), "head": ("head.fc",)},
        lambda stage, index, _: f"s{stage}.b{index + 1}",
        {
            "conv1": ("conv1.conv", "conv1.bn"),
            "conv2": ("conv2.conv", "conv2.bn"),
            "conv3": ("conv3.conv", "conv3.bn"),
            "shortcut": ("downsample.conv", "downsample.bn"),
        },
    ),
)

_MOBILENETV2_OUTSIDE = {
    "stem": ("features.0.0", "features.0.1"),
    "last": ("features.18.0", "features.18.1"),
    "head": ("classifier.1",),
}
MOBILENETV2 = (
    Layout(
        "BRECQ, QDrop",
        _MOBILENETV2_OUTSIDE,
        lambda _stage, _index, flat: f"features.{flat + 1}.conv",
        _FLAT,
        _FLAT_UNEXPANDED,
    ),
    Layout(
        "torchvision",
        _MOBILENETV2_OUTSIDE,
        lambda _stage, _index, flat: f"features.{flat + 1}.conv",
        _NESTED,
        _NESTED_UNEXPANDED,
    ),
    _TIMM_MOBILE,
)

MNASNET = (
    Layout(
        "BRECQ, QDrop, torchvision",
        {
            "stem": ("layers.0", "layers.1"),
            "depthwise": ("layers.3", "layers.4"),
            "pointwise": ("layers.6", "layers.7"),
            "last": ("layers.14", "layers.15"),
            "head": ("classifier.1",),
        },
        lambda stage, index, _: f"layers.{stage + 7}.{index}.layers",
        _FLAT,
    ),
    _TIMM_MOBILE._replace(
        outside={
            **_TIMM_MOBILE.outside,
            "depthwise": ("blocks.0.0.conv_dw", "blocks.0.0.bn1"),
            "pointwise": ("blocks.0.0.conv_pw", "blocks.0.0.bn2"),
        },
        block=lambda stage, index, _: f"blocks.{stage}.{index}",
    ),
)

EFFICIENTNET_LITE = (
    Layout(
        "efficientnet-lite-pytorch",
        {
            "stem": ("_conv_stem", "_bn0"),
            "last": ("_conv_head", "_bn1"),
            "head": ("_fc",),
        },
        lambda _stage, _index, flat: f"_blocks.{flat}",
        {
            "expand": ("_expand_conv", "_bn0"),
            "depthwise": ("_depthwise_conv", "_bn1"),
            "project": ("_project_conv", "_bn2"),
        },
    ),
    # timm's efficientnet_lite0 (without tf_) has these names too, but was trained with symmetric
    # padding and epsilon 1e-5: nothing in the file tells, so its accuracy would be the first sign.
    _TIMM_MOBILE._replace(source="timm's tf_efficientnet_lite0"),
)
