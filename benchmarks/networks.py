"""Convolutional networks of published shapes, with random weights: how long they take does not depend on these."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Shape = tuple[int, int, int]
"""Channels, height and width of an input."""


def conv(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int] = 3,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """Return convolution, BatchNorm and, if there is one, an activation."""
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = tuple((side - 1) // 2 for side in sides)
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([act()] if act else []))


class Residual(nn.Module):
    """Layers beside a shortcut, then an activation: ResNet's and MobileNetV2's block."""

    def __init__(self, layers: Sequence[nn.Module], shortcut: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.layers, self.shortcut, self.act = nn.Sequential(*layers), shortcut, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layers(x) + self.shortcut(x))  # type: ignore[no-any-return]


def _classifier(width: int, classes: int, *layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def _resnet(blocks: Sequence[int], is_bottleneck: bool) -> nn.Sequential:
    """Return a ResNet for ImageNet (He et al. 2015). blocks: of each of the four stages."""
    expansion = 4 if is_bottleneck else 1
    layers: list[nn.Module] = [conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        outputs = width * expansion
        for i in range(count):
            stride = 2 if stage and not i else 1
            if is_bottleneck:
                body = [conv(inputs, width, 1), conv(width, width, 3, stride), conv(width, outputs, 1, act=None)]
            else:
                body = [conv(inputs, width, 3, stride), conv(width, outputs, act=None)]
            is_same = stride == 1 and inputs == outputs
            shortcut = nn.Identity() if is_same else conv(inputs, outputs, 1, stride, act=None)
            layers.append(Residual(body, shortcut, nn.ReLU()))
            inputs = outputs
    return _classifier(inputs, 1000, *layers)


# Of each of MobileNetV2's stages: expansion, channels, blocks, stride of the first one (Sandler et al. 2018, table 2).
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _mobilenet_v2() -> nn.Sequential:
    layers: list[nn.Module] = [conv(3, 32, 3, 2, act=nn.ReLU6)]
    inputs = 32
    for expansion, outputs, count, first in _STAGES:
        for i in range(count):
            stride, wide = (1 if i else first), inputs * expansion
            body = [conv(inputs, wide, 1, act=nn.ReLU6)] if expansion > 1 else []
            body += [conv(wide, wide, 3, stride, wide, nn.ReLU6), conv(wide, outputs, 1, act=None)]
            is_residual = stride == 1 and inputs == outputs
            layers.append(Residual(body, nn.Identity(), nn.Identity()) if is_residual else nn.Sequential(*body))
            inputs = outputs
    return _classifier(1280, 1000, *layers, conv(inputs, 1280, 1, act=nn.ReLU6))


def _ds_cnn() -> nn.Sequential:
    """Return the small network for spoken keywords (Zhang et al. 2017), with MLPerf Tiny's layers."""
    separable = [layer for _ in range(4) for layer in (conv(64, 64, 3, 1, 64), conv(64, 64, 1))]
    return _classifier(64, 12, conv(1, 64, (10, 4), 2), *separable)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "resnet18": (lambda: _resnet((2, 2, 2, 2), is_bottleneck=False), (3, 224, 224)),
    "resnet50": (lambda: _resnet((3, 4, 6, 3), is_bottleneck=True), (3, 224, 224)),
    "mobilenetv2": (_mobilenet_v2, (3, 224, 224)),
    "dscnn": (_ds_cnn, (1, 49, 10)),
}
"""What makes each network, and the shape of an input."""


@torch.no_grad()
def make(name: str) -> tuple[nn.Module, Shape]:
    """Return a network in eval mode whose BatchNorms have seen two inputs, and the shape of an input."""
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    model = build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a mean of all that it sees
    model.train()(torch.randn(2, *shape))
    return model.eval(), shape
