# ruff: noqa: D102  (every `forward` maps images or features to features)
"""Standard image classifiers as plain torch modules; images are (n, 3, h, w), outputs logits.

Parameter names follow the usual torch ones where that costs nothing. Every constructor takes
`classes` and, where two forms exist, `cifar`: for 32x32 images the stem keeps the resolution.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv_bn(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution without bias, "same" padding, and BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            stride,
            padding=kernel // 2,
            groups=groups,
            bias=False,
        ),
        nn.BatchNorm2d(out_channels),
    )


class PaddedShortcut(nn.Module):
    """Option A of He et al. 2015: every second pixel, new channels are zero. No parameters."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; `option` A pads where shapes change, B projects."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = conv_bn(in_channels, width, 3, stride)
        self.conv2 = conv_bn(width, width, 3)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != width:
            self.shortcut = (
                PaddedShortcut(in_channels, width)
                if option == "A"
                else conv_bn(in_channels, width, 1, stride)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(functional.relu(self.conv1(x)))
        return functional.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 to four times the width; projection shortcuts."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, option: str) -> None:
        super().__init__()
        if option != "B":
            raise ValueError(f"a bottleneck takes option B only; got {option!r}")
        self.conv1 = conv_bn(in_channels, width, 1)
        self.conv2 = conv_bn(width, width, 3, stride)
        self.conv3 = conv_bn(width, 4 * width, 1)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != 4 * width:
            self.shortcut = conv_bn(in_channels, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.conv2(functional.relu(self.conv1(x))))
        return functional.relu(self.conv3(y) + self.shortcut(x))


class ResNet(nn.Module):
    """He et al. 2015: stages of residual blocks, the width doubles from stage to stage."""

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        classes: int,
        width: int = 64,
        bottleneck: bool = False,
        option: str = "B",
        cifar: bool = True,
    ) -> None:
        super().__init__()
        stem = conv_bn(3, width, 3) if cifar else conv_bn(3, width, 7, 2)
        pool = [] if cifar else [nn.MaxPool2d(3, 2, padding=1)]
        self.stem = nn.Sequential(stem, nn.ReLU(), *pool)
        block = Bottleneck if bottleneck else BasicBlock
        channels = width
        stages = []
        for stage, count in enumerate(blocks):
            members: list[nn.Module] = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                members.append(block(channels, width << stage, stride, option))
                channels = (width << stage) * block.expansion
            stages.append(nn.Sequential(*members))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.stages(self.stem(x))).flatten(1))


VGG_LAYERS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """Simonyan and Zisserman 2014: 3x3 convolutions, then 4096-4096-classes fully connected.

    In CIFAR form the fully connected layers see 1x1x512 instead of 7x7x512.
    """

    def __init__(self, depth: int, *, classes: int, batch_norm: bool, cifar: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage, count in enumerate(VGG_LAYERS[depth]):
            width = min(64 << stage, 512)
            for _ in range(count):
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                layers += [nn.BatchNorm2d(width)] if batch_norm else []
                layers.append(nn.ReLU())
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.Identity() if cifar else nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(512 if cifar else 512 * 7 * 7, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


class InvertedResidual(nn.Module):
    """Expand by 1x1, depthwise 3x3, project by 1x1; a shortcut where shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = in_channels * expand
        layers = [conv_bn(in_channels, hidden, 1), nn.ReLU6()] if expand > 1 else []
        self.layers = nn.Sequential(
            *layers,
            conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU6(),
            conv_bn(hidden, out_channels, 1),
        )
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNetV2(nn.Module):
    """Sandler et al. 2018, width 1.0."""

    def __init__(self, *, classes: int, cifar: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn(3, 32, 3, 1 if cifar else 2), nn.ReLU6()]
        channels = 32
        for expand, width, count, stride in (
            (1, 16, 1, 1),
            (6, 24, 2, 1 if cifar else 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ):
            for index in range(count):
                first = stride if index == 0 else 1
                layers.append(InvertedResidual(channels, width, first, expand))
                channels = width
        layers += [conv_bn(320, 1280, 1), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


def shuffle_channels(x: Tensor, half: int) -> Tensor:
    """Interleave the two halves of `2 * half` channels: reshape, transpose, reshape."""
    count, _, height, width = x.shape
    pairs = x.reshape(count, 2, half, height, width).transpose(1, 2)
    return pairs.reshape(count, 2 * half, height, width)


class ShuffleUnit(nn.Module):
    """Ma et al. 2018, figure 3 (c) for stride 1 and (d) for stride 2."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.branch_channels = half = out_channels // 2
        self.left: nn.Module | None = None
        if stride > 1:
            depthwise = conv_bn(in_channels, in_channels, 3, stride, groups=in_channels)
            self.left = nn.Sequential(depthwise, conv_bn(in_channels, half, 1), nn.ReLU())
        self.right = nn.Sequential(
            conv_bn(in_channels if stride > 1 else half, half, 1),
            nn.ReLU(),
            conv_bn(half, half, 3, stride, groups=half),
            conv_bn(half, half, 1),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.left is None:
            left, right = x.split([self.branch_channels] * 2, dim=1)
        else:
            left, right = self.left(x), x
        return shuffle_channels(
            torch.cat([left, self.right(right)], dim=1), self.branch_channels
        )


class ShuffleNetV2(nn.Module):
    """Ma et al. 2018, width 1.0."""

    def __init__(self, *, classes: int, cifar: bool) -> None:
        super().__init__()
        pool = [] if cifar else [nn.MaxPool2d(3, 2, padding=1)]
        layers: list[nn.Module] = [conv_bn(3, 24, 3, 1 if cifar else 2), nn.ReLU(), *pool]
        channels = 24
        for width, count in ((116, 4), (232, 8), (464, 4)):
            for index in range(count):
                layers.append(ShuffleUnit(channels, width, 2 if index == 0 else 1))
                channels = width
        layers += [conv_bn(464, 1024, 1), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution; its output is appended to its input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(functional.relu(self.norm(x)))], dim=1)


class DenseNet(nn.Module):
    """Huang et al. 2016 for CIFAR, without bottlenecks: three blocks, growth 12."""

    def __init__(self, *, classes: int, depth: int = 40, growth: int = 12) -> None:
        super().__init__()
        channels = 16
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
        for block in range(3):
            for _ in range((depth - 4) // 3):
                layers.append(DenseLayer(channels, growth))
                channels += growth
            layers += [nn.BatchNorm2d(channels), nn.ReLU()]
            if block < 2:
                layers += [nn.Conv2d(channels, channels, 1, bias=False), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


class Fire(nn.Module):
    """Squeeze by 1x1, expand by 1x1 and 3x3 side by side."""

    def __init__(self, in_channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.squeeze(x))
        return functional.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


class SqueezeNet(nn.Module):
    """Iandola et al. 2016, version 1.1; no BatchNorm, classifier is a 1x1 convolution."""

    def __init__(self, *, classes: int, cifar: bool) -> None:
        super().__init__()
        stem = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()]
        if not cifar:
            stem = [nn.Conv2d(3, 64, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)]
        layers: list[nn.Module] = stem
        channels = 64
        for squeeze, expand, pool in (
            (16, 64, False),
            (16, 64, True),
            (32, 128, False),
            (32, 128, True),
            (48, 192, False),
            (48, 192, False),
            (64, 256, False),
            (64, 256, False),
        ):
            layers.append(Fire(channels, squeeze, expand))
            layers += [nn.MaxPool2d(3, 2, ceil_mode=True)] if pool else []
            channels = 2 * expand
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Conv2d(channels, classes, 1), nn.ReLU()
        )
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.classifier(self.features(x))).flatten(1)
