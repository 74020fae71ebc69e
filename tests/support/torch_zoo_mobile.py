"""The inverted-residual networks of `torch_zoo`, in PyTorch."""

import math

import pytest

torch = pytest.importorskip("torch", reason="the twins are PyTorch (pip install -e '.[torch]')")
nn, functional = torch.nn, torch.nn.functional


def conv(inputs, outputs, size, stride=1, groups=1):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


class Inverted(nn.Module):
    """MobileNetV2's block as a sequence under a release's name."""

    def __init__(self, name, inputs, outputs, ratio, stride, size, act):
        super().__init__()
        wide = inputs * ratio
        layers = [] if ratio == 1 else [conv(inputs, wide, 1), nn.BatchNorm2d(wide), act()]
        layers += [conv(wide, wide, size, stride, wide), nn.BatchNorm2d(wide), act()]
        layers += [conv(wide, outputs, 1), nn.BatchNorm2d(outputs)]
        self.add_module(name, nn.Sequential(*layers))
        self.name, self.skip = name, stride == 1 and inputs == outputs

    def forward(self, x):
        y = getattr(self, self.name)(x)
        return x + y if self.skip else y


def inverted_stages(name, inputs, table, act):
    """A list of blocks for every (ratio, channels, depth, stride, size)."""
    for ratio, channels, depth, stride, size in table:
        blocks = []
        for index in range(depth):
            step = 1 if index else stride
            blocks.append(Inverted(name, inputs, channels, ratio, step, size, act))
            inputs = channels
        yield blocks


class MobileNetV2(nn.Module):
    TABLE = (
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3), (6, 96, 3, 1, 3),
        (6, 160, 3, 2, 3), (6, 320, 1, 1, 3),
    )  # fmt: skip

    def __init__(self):
        super().__init__()
        stem = nn.Sequential(conv(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU6())
        last = nn.Sequential(conv(320, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6())
        stages = inverted_stages("conv", 32, self.TABLE, nn.ReLU6)
        self.features = nn.Sequential(stem, *(b for blocks in stages for b in blocks), last)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(1280, 1000))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class MNASNet(nn.Module):
    """MnasNet-B1 with all channels but the last conv's doubled."""

    TABLE = (
        (3, 24, 3, 2, 3), (3, 40, 3, 2, 5), (6, 80, 3, 2, 5), (6, 96, 2, 1, 3), (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    )  # fmt: skip

    def __init__(self):
        super().__init__()
        table = [(ratio, 2 * channels, *rest) for ratio, channels, *rest in self.TABLE]
        stages = inverted_stages("layers", 32, table, nn.ReLU)
        self.layers = nn.Sequential(
            conv(3, 64, 3, 2), nn.BatchNorm2d(64), nn.ReLU(),
            conv(64, 64, 3, groups=64), nn.BatchNorm2d(64), nn.ReLU(),
            conv(64, 32, 1), nn.BatchNorm2d(32),
            *(nn.Sequential(*blocks) for blocks in stages),
            conv(640, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(1280, 1000))

    def forward(self, x):
        return self.classifier(self.layers(x).mean((2, 3)))


class SameConv(nn.Conv2d):
    """TensorFlow's "SAME": ceil(size / stride) outputs, the odd pixel of padding at the end."""

    def forward(self, x):
        sides = []
        for length in (x.shape[3], x.shape[2]):
            kernel, stride = self.kernel_size[0], self.stride[0]
            total = max((math.ceil(length / stride) - 1) * stride + kernel - length, 0)
            sides += [total // 2, total - total // 2]
        return super().forward(functional.pad(x, sides))


class LiteBlock(nn.Module):
    def __init__(self, inputs, outputs, ratio, stride, size):
        super().__init__()
        wide = inputs * ratio
        norm = lambda channels: nn.BatchNorm2d(channels, eps=1e-3)  # noqa: E731
        if ratio > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(inputs, wide, 1, bias=False), norm(wide)
        self._depthwise_conv = SameConv(wide, wide, size, stride, groups=wide, bias=False)
        self._bn1 = norm(wide)
        self._project_conv, self._bn2 = nn.Conv2d(wide, outputs, 1, bias=False), norm(outputs)
        self.expands, self.skip = ratio > 1, stride == 1 and inputs == outputs

    def forward(self, x):
        y = functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skip else y


class EfficientNetLite(nn.Module):
    """`channels` and `depths` of the stages are those of the release's arrays."""

    RATIOS, STRIDES, SIZES = (1, *[6] * 6), (1, 2, 2, 2, 1, 2, 1), (3, 3, 5, 3, 5, 5, 3)

    def __init__(self, channels, depths):
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, inputs = [], 32
        rows = zip(self.RATIOS, channels, depths, self.STRIDES, self.SIZES, strict=True)
        for ratio, outputs, depth, stride, size in rows:
            for index in range(depth):
                blocks.append(LiteBlock(inputs, outputs, ratio, 1 if index else stride, size))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(inputs, 1280, 1, bias=False)
        self._bn1, self._fc = nn.BatchNorm2d(1280, eps=1e-3), nn.Linear(1280, 1000)

    def forward(self, x):
        x = functional.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return self._fc(functional.relu6(self._bn1(self._conv_head(x))).mean((2, 3)))
