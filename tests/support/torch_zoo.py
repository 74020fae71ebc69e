"""The networks of the zoo in PyTorch, written from the papers and not from our flax code.

Their state dicts have the names of the public releases: ResNet as in torchvision, the others as
in the BRECQ and QDrop releases, EfficientNet-Lite as in efficientnet-lite-pytorch.
"""

import math
from collections import OrderedDict

import pytest

torch = pytest.importorskip("torch", reason="the twins are PyTorch (pip install -e '.[torch]')")

from tests.support import torch_zoo_mobile as mobile  # noqa: E402
from tests.support.torch_zoo_mobile import conv  # noqa: E402

nn, functional = torch.nn, torch.nn.functional


class Sum(nn.Module):
    """relu(body(x) + shortcut(x)) for children called as the release calls them."""

    def __init__(self, body, shortcut):
        super().__init__()
        self.body_names, self.shortcut_names = list(body), list(shortcut)
        for name, module in [*body.items(), *shortcut.items()]:
            self.add_module(name, module)

    def forward(self, x):
        y, skip = x, x
        for name in self.body_names:
            y = getattr(self, name)(y)
        for name in self.shortcut_names:
            skip = getattr(self, name)(skip)
        return functional.relu(y + skip)


def chain(relu, **modules):
    """A plain chain with a ReLU after all but the last batch norm."""
    named = OrderedDict()
    for name, module in modules.items():
        named[name] = module
        if isinstance(module, nn.BatchNorm2d):
            named[f"{relu}_{name}"] = nn.ReLU()
    named.popitem()
    return named


def resnet_block(inputs, width, stride, bottleneck):
    outputs = 4 * width if bottleneck else width
    if bottleneck:
        shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
    else:
        shapes = [(inputs, width, 3, stride), (width, width, 3, 1)]
    modules = {}
    for index, shape in enumerate(shapes, 1):
        modules[f"conv{index}"] = conv(*shape)
        modules[f"bn{index}"] = nn.BatchNorm2d(shape[1])
    shortcut = {}
    if stride > 1 or inputs != outputs:
        projection = conv(inputs, outputs, 1, stride)
        shortcut["downsample"] = nn.Sequential(projection, nn.BatchNorm2d(outputs))
    return Sum(chain("relu", **modules), shortcut), outputs


class ResNet(nn.Module):
    def __init__(self, depths, bottleneck):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        width = 64
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage and not index else 1
                block, width = resnet_block(width, 64 * 2**stage, stride, bottleneck)
                blocks.append(block)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(width, 1000)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(x.mean((2, 3)))


class OptionA(nn.Module):
    """The CIFAR block: every second pixel, new channels of zeros on both sides."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x):
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        half = self.extra // 2
        skip = x[:, :, :: self.stride, :: self.stride]
        return functional.relu(y + functional.pad(skip, (0, 0, 0, 0, half, half)))


class ResNetCifar(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 16, 3), nn.BatchNorm2d(16)
        count = (depth - 2) // 6
        for stage, (inputs, width) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            first = OptionA(inputs, width, 1 if stage == 1 else 2)
            rest = [OptionA(width, width, 1) for _ in range(count - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def regnet_widths(slope, initial, multiplier, depth):
    """Widths and depths of the stages by the paper's quantized linear rule (Eq. 2 to 4)."""
    widths = []
    for index in range(depth):
        exponent = round(math.log((initial + slope * index) / initial, multiplier))
        widths.append(8 * round(initial * multiplier**exponent / 8))
    stages = sorted(set(widths))
    return stages, [widths.count(width) for width in stages]


class RegNetX(nn.Module):
    def __init__(self, slope, initial, multiplier, depth, group):
        super().__init__()
        widths, depths = regnet_widths(slope, initial, multiplier, depth)
        widths = [round(width / group) * group for width in widths]
        self.stem = nn.Sequential(
            OrderedDict(conv=conv(3, 32, 3, 2), bn=nn.BatchNorm2d(32), relu=nn.ReLU())
        )
        inputs = 32
        for stage, (width, count) in enumerate(zip(widths, depths, strict=True), 1):
            blocks = OrderedDict()
            for index in range(count):
                blocks[f"b{index + 1}"] = self.block(inputs, width, 1 if index else 2, group)
                inputs = width
            self.add_module(f"s{stage}", nn.Sequential(blocks))
        self.head = nn.Sequential(
            OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(inputs, 1000))
        )

    @staticmethod
    def block(inputs, width, stride, group):
        modules = chain(
            "relu",
            a=conv(inputs, width, 1), a_bn=nn.BatchNorm2d(width),
            b=conv(width, width, 3, stride, width // group), b_bn=nn.BatchNorm2d(width),
            c=conv(width, width, 1), c_bn=nn.BatchNorm2d(width),
        )  # fmt: skip
        shortcut = {}
        if stride > 1 or inputs != width:
            shortcut = {"proj": conv(inputs, width, 1, stride), "bn": nn.BatchNorm2d(width)}
        return Sum({"f": nn.Sequential(modules)}, shortcut)

    def forward(self, x):
        for module in self.children():
            x = module(x)
        return x


NETWORKS = {
    "resnet18": lambda: ResNet((2, 2, 2, 2), bottleneck=False),
    "resnet50": lambda: ResNet((3, 4, 6, 3), bottleneck=True),
    "mobilenetv2": mobile.MobileNetV2,
    "mnasnet2": mobile.MNASNet,
    "regnetx_600mf": lambda: RegNetX(36.97, 48, 2.24, 16, 24),
    "regnetx_3200mf": lambda: RegNetX(26.31, 88, 2.25, 25, 48),
    "efficientnet_lite0": lambda: mobile.EfficientNetLite(
        (16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1)
    ),
    "efficientnet_lite2": lambda: mobile.EfficientNetLite(
        (16, 24, 48, 88, 120, 208, 352), (1, 3, 3, 4, 4, 5, 1)
    ),
    "resnet20_cifar": lambda: ResNetCifar(20),
}


def logits(name, random_array, images):
    """Logits [N, classes] of NHWC images, all arrays by ``random_array(name, shape)``.

    Returns:
      The logits, and the state dict as numpy arrays.
    """
    network = NETWORKS[name]().eval()
    state = {
        key: torch.tensor(random_array(key, tuple(value.shape)))
        for key, value in network.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    network.load_state_dict(state, strict=False)
    with torch.no_grad():
        found = network(torch.tensor(images).permute(0, 3, 1, 2).contiguous())
    return found.numpy(), {key: value.numpy() for key, value in state.items()}
