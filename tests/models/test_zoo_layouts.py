"""Every public layout of every family: names that the releases hold, and filling from them."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from aquant_jax import models
from tests.support import torch_zoo_states as states

# Arrays that the releases are known to hold, by (model, source).
KNOWN = {
    ("resnet18", "BRECQ, QDrop, torchvision, timm"): {
        "conv1.weight": (64, 3, 7, 7), "bn1.running_mean": (64,),
        "layer1.0.conv2.weight": (64, 64, 3, 3), "layer2.0.downsample.0.weight": (128, 64, 1, 1),
        "layer2.0.downsample.1.running_var": (128,), "layer4.1.bn2.bias": (512,),
        "fc.weight": (1000, 512), "fc.bias": (1000,),
    },
    ("resnet50", "BRECQ, QDrop, torchvision, timm"): {
        "layer1.0.downsample.0.weight": (256, 64, 1, 1), "layer3.5.conv3.weight": (1024, 256, 1, 1),
        "layer4.2.bn3.weight": (2048,), "fc.weight": (1000, 2048),
    },
    ("mobilenetv2", "BRECQ, QDrop"): {
        "features.0.0.weight": (32, 3, 3, 3), "features.1.conv.0.weight": (32, 1, 3, 3),
        "features.1.conv.3.weight": (16, 32, 1, 1), "features.2.conv.6.weight": (24, 96, 1, 1),
        "features.17.conv.7.running_var": (320,), "features.18.1.bias": (1280,),
        "classifier.1.weight": (1000, 1280),
    },
    ("mobilenetv2", "torchvision"): {
        "features.0.1.weight": (32,), "features.1.conv.0.0.weight": (32, 1, 3, 3),
        "features.1.conv.1.weight": (16, 32, 1, 1), "features.1.conv.2.weight": (16,),
        "features.2.conv.0.0.weight": (96, 16, 1, 1), "features.2.conv.1.0.weight": (96, 1, 3, 3),
        "features.2.conv.2.weight": (24, 96, 1, 1), "features.17.conv.3.running_mean": (320,),
        "features.18.0.weight": (1280, 320, 1, 1), "classifier.1.bias": (1000,),
    },
    ("mobilenetv2", "timm"): {
        "conv_stem.weight": (32, 3, 3, 3), "blocks.0.0.conv_dw.weight": (32, 1, 3, 3),
        "blocks.0.0.conv_pw.weight": (16, 32, 1, 1), "blocks.0.0.bn2.weight": (16,),
        "blocks.1.0.conv_pw.weight": (96, 16, 1, 1), "blocks.1.1.conv_pwl.weight": (24, 144, 1, 1),
        "blocks.6.0.bn3.running_var": (320,), "conv_head.weight": (1280, 320, 1, 1),
        "bn2.bias": (1280,), "classifier.weight": (1000, 1280),
    },
    ("mnasnet2", "BRECQ, QDrop, torchvision"): {
        "layers.0.weight": (64, 3, 3, 3), "layers.3.weight": (64, 1, 3, 3),
        "layers.6.weight": (32, 64, 1, 1), "layers.7.running_mean": (32,),
        "layers.8.0.layers.0.weight": (96, 32, 1, 1), "layers.9.1.layers.3.weight": (240, 1, 5, 5),
        "layers.12.3.layers.7.bias": (384,), "layers.13.0.layers.6.weight": (640, 2304, 1, 1),
        "layers.14.weight": (1280, 640, 1, 1), "classifier.1.weight": (1000, 1280),
    },
    ("mnasnet2", "timm"): {
        "blocks.0.0.conv_dw.weight": (64, 1, 3, 3), "blocks.0.0.bn2.bias": (32,),
        "blocks.1.0.conv_pw.weight": (96, 32, 1, 1), "blocks.6.0.conv_pwl.weight":
        (640, 2304, 1, 1), "conv_head.weight": (1280, 640, 1, 1),
    },
    ("regnetx_600mf", "BRECQ, QDrop"): {
        "stem.conv.weight": (32, 3, 3, 3), "stem.bn.bias": (32,),
        "s1.b1.proj.weight": (48, 32, 1, 1), "s1.b1.bn.running_var": (48,),
        "s2.b3.f.b.weight": (96, 24, 3, 3), "s4.b7.f.c_bn.weight": (528,),
        "head.fc.weight": (1000, 528),
    },
    ("regnetx_3200mf", "torchvision"): {
        "stem.0.weight": (32, 3, 3, 3), "stem.1.running_mean": (32,),
        "trunk_output.block1.block1-0.proj.0.weight": (96, 32, 1, 1),
        "trunk_output.block1.block1-0.proj.1.weight": (96,),
        "trunk_output.block3.block3-14.f.b.0.weight": (432, 48, 3, 3),
        "trunk_output.block4.block4-1.f.c.1.bias": (1008,), "fc.weight": (1000, 1008),
    },
    ("regnetx_600mf", "timm"): {
        "s1.b1.downsample.conv.weight": (48, 32, 1, 1), "s1.b1.downsample.bn.weight": (48,),
        "s3.b5.conv2.conv.weight": (240, 24, 3, 3), "s4.b7.conv3.bn.bias": (528,),
        "head.fc.bias": (1000,),
    },
    ("efficientnet_lite0", "efficientnet-lite-pytorch"): {
        "_conv_stem.weight": (32, 3, 3, 3), "_blocks.0._depthwise_conv.weight": (32, 1, 3, 3),
        "_blocks.15._project_conv.weight": (320, 1152, 1, 1), "_fc.weight": (1000, 1280),
    },
    ("efficientnet_lite0", "timm's tf_efficientnet_lite0"): {
        "blocks.0.0.conv_pw.weight": (16, 32, 1, 1), "blocks.5.3.conv_pwl.weight":
        (192, 1152, 1, 1), "bn2.weight": (1280,), "classifier.weight": (1000, 1280),
    },
}  # fmt: skip


def layout_of(name, source):
    return [layout.source for layout in models.LINEN[name][1]].index(source)


@pytest.mark.parametrize(("name", "source"), KNOWN, ids=" ".join)
def test_names_are_those_of_the_release(name, source):
    shapes = states.shapes(name, layout_of(name, source))
    for array, shape in KNOWN[name, source].items():
        assert shapes.get(array) == shape


def test_every_layout_of_every_family_is_known_here():
    listed = {(id(models.LINEN[name][1]), source) for name, source in KNOWN}
    every = {(id(f), layout.source) for _, f in models.LINEN.values() for layout in f}
    cifar = id(models.LINEN["resnet20_cifar"][1])
    assert {pair for pair in every if pair[0] != cifar} == listed


@pytest.mark.parametrize(
    ("name", "layout"),
    [(n, i) for n in ("mobilenetv2", "regnetx_600mf") for i in range(3)]
    + [("mnasnet2", 1), ("efficientnet_lite0", 1), ("resnet18", 0)],
)
def test_a_checkpoint_in_any_layout_fills_the_network(name, layout, tmp_path):
    _, variables = models.create(name)
    save_file(states.state_dict(name, variables, layout), tmp_path / "w.safetensors")
    _, found = models.create(name, tmp_path / "w.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found, variables)
