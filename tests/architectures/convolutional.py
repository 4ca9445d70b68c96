"""Published convolutional architectures, small, for static quantization. Each takes images (B, 3, 32, 32)."""

import torch
import torch.nn.functional as F
from torch import nn


def conv(inputs, outputs, kernel=3, stride=1, groups=1, act=nn.ReLU):
    """Return convolution, BatchNorm and, if there is one, an activation."""
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(outputs), *([act()] if act else []))


class Classifier(nn.Module):
    """Layers, the mean of all places, a Linear."""

    def __init__(self, width, *layers):
        super().__init__()
        self.features, self.head = nn.Sequential(*layers), nn.Linear(width, 10)

    def forward(self, x):
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.features(x), 1), 1))


class Residual(nn.Module):
    """ResNet's, ResNeXt's and MobileNetV2's block: layers beside a shortcut, then an activation."""

    def __init__(self, layers, shortcut=None, act=None):
        super().__init__()
        self.layers, self.shortcut, self.act = nn.Sequential(*layers), shortcut or nn.Identity(), act or nn.Identity()

    def forward(self, x):
        return self.act(self.layers(x) + self.shortcut(x))


class SqueezeExcite(nn.Module):
    """A weight for each channel, from the means of all."""

    def __init__(self, width, gate):
        super().__init__()
        self.squeeze, self.excite, self.gate = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1), gate

    def forward(self, x):
        scale = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.excite(F.relu(self.squeeze(scale))))


class Fire(nn.Module):
    """SqueezeNet's module."""

    def __init__(self, inputs, squeezed, outputs):
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.one, self.three = nn.Conv2d(squeezed, outputs, 1), nn.Conv2d(squeezed, outputs, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


class Mixed(nn.Module):
    """GoogLeNet's module: branches joined."""

    def __init__(self):
        super().__init__()
        self.one, self.three = conv(16, 8, 1), nn.Sequential(conv(16, 8, 1), conv(8, 8))
        self.pooled = conv(16, 8, 1)

    def forward(self, x):
        return torch.cat([self.one(x), self.three(x), self.pooled(F.max_pool2d(x, 3, 1, 1))], 1)


class Dense(nn.Module):
    """DenseNet's block: each layer reads all before it, normalized first."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 8 * i) for i in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(16 + 8 * i, 8, 3, padding=1, bias=False) for i in range(2))

    def forward(self, x):
        for norm, layer in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, layer(F.relu(norm(x)))], 1)
        return x


class Shuffle(nn.Module):
    """ShuffleNetV2's block: half of the channels pass, and all are shuffled."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(conv(8, 8, 1), conv(8, 8, 3, 1, 8, None), conv(8, 8, 1))

    def forward(self, x):
        left, right = x.chunk(2, dim=1)
        x = torch.cat((left, self.branch(right)), dim=1)
        batch, channels, height, width = x.size()
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return x.view(batch, -1, height, width)


class ConvNeXt(nn.Module):
    """A depthwise convolution, LayerNorm over channels, two Linears, a residual."""

    def __init__(self):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(16, 16, 7, padding=3, groups=16), nn.LayerNorm(16)
        self.up, self.down, self.gamma = nn.Linear(16, 64), nn.Linear(64, 16), nn.Parameter(0.5 * torch.ones(16))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class UNet(nn.Module):
    """Down, up by a transposed convolution, and what was there before beside it."""

    def __init__(self):
        super().__init__()
        self.down, self.inner, self.up = conv(3, 16), conv(16, 32), nn.ConvTranspose2d(32, 16, 2, 2)
        self.join, self.head = conv(32, 16), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        x = self.down(x)
        y = self.up(self.inner(F.max_pool2d(x, 2)))
        return self.head(self.join(torch.cat([x, y], 1)))


class DeepLab(nn.Module):
    """Dilated convolutions side by side, the image's mean, bilinear interpolation."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 16, stride=2)
        self.rates = nn.ModuleList(nn.Conv2d(16, 8, 3, padding=rate, dilation=rate) for rate in (1, 2, 4))
        self.pooled, self.head = nn.Conv2d(16, 8, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x):
        size, x = x.shape[-2:], self.stem(x)
        pooled = F.relu(self.pooled(F.adaptive_avg_pool2d(x, 1))).expand(-1, -1, x.shape[2], x.shape[3])
        x = self.head(torch.cat([*(F.relu(layer(x)) for layer in self.rates), pooled], 1))
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class Pyramid(nn.Module):
    """RetinaNet's neck and heads: three scales added from above, heads shared by all."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([conv(3, 16, stride=2), conv(16, 16, stride=2), conv(16, 16, stride=2)])
        self.lateral = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(3))
        self.tower, self.classes, self.boxes = conv(16, 16), nn.Conv2d(16, 6, 3, 1, 1), nn.Conv2d(16, 4, 3, 1, 1)

    def forward(self, x):
        found, levels = None, []
        for stage in self.stages:
            levels.append(x := stage(x))
        outputs = []
        for level, lateral in zip(reversed(levels), reversed(self.lateral), strict=True):
            here = lateral(level)
            found = here if found is None else here + F.interpolate(found, scale_factor=2.0)
            y = self.tower(found)
            outputs.append((self.classes(y).flatten(2), self.boxes(y).flatten(2)))
        return outputs


class Yolo(nn.Module):
    """SiLU, a spatial pyramid of poolings, upsampling, two outputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = conv(3, 16, 3, 2, act=nn.SiLU), conv(16, 16, act=nn.SiLU)
        self.deep, self.pool = conv(16, 32, 3, 2, act=nn.SiLU), nn.MaxPool2d(5, 1, 2)
        self.spp, self.up = conv(96, 32, 1, act=nn.SiLU), nn.Upsample(scale_factor=2)
        self.fine, self.heads = (
            conv(48, 16, 1, act=nn.SiLU),
            nn.ModuleList([nn.Conv2d(16, 18, 1), nn.Conv2d(32, 18, 1)]),
        )

    def forward(self, x):
        x = self.stem(x)
        x = x + self.body(x)
        y = self.deep(x)
        once = self.pool(y)
        y = self.spp(torch.cat((y, once, self.pool(once)), 1))
        outputs = []
        for part, head in zip((self.fine(torch.cat((self.up(y), x), 1)), y), self.heads, strict=True):
            z = head(part)
            batch, _, height, width = z.shape
            outputs.append(z.view(batch, 3, 6, height, width).permute(0, 1, 3, 4, 2).sigmoid())
        return outputs


class SuperResolution(nn.Module):
    """SRResNet: PReLU, residuals, PixelShuffle."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(), conv(16, 16, act=None)
        self.last, self.shuffle = nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2)

    def forward(self, x):
        y = self.act(self.first(x))
        return self.shuffle(self.last(y + self.body(y)))


class Crnn(nn.Module):
    """OCR: convolutions, an LSTM along the line, a Linear."""

    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(conv(3, 32), nn.MaxPool2d(2), conv(32, 64), nn.MaxPool2d((2, 1)))
        self.lstm, self.head = nn.LSTM(512, 64, bidirectional=True, batch_first=True), nn.Linear(128, 30)

    def forward(self, x):
        x = self.convs(x)
        batch, channels, height, width = x.size()
        x, _ = self.lstm(x.permute(0, 3, 1, 2).reshape(batch, width, channels * height))
        return self.head(x)


class Tcn(nn.Module):
    """Dilated convolutions over time, gated (WaveNet's, Conv-TasNet's)."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(3, 32, 3, padding=2, dilation=2)
        self.depthwise, self.norm = nn.Conv1d(32, 32, 3, groups=32, padding=1), nn.BatchNorm1d(32)
        self.value, self.gate, self.last = nn.Conv1d(32, 32, 1), nn.Conv1d(32, 32, 1), nn.Conv1d(32, 5, 1)

    def forward(self, x):
        x = F.leaky_relu(self.first(x.flatten(2)), 0.2)
        y = self.norm(self.depthwise(x))
        return self.last(x + torch.tanh(self.value(y)) * torch.sigmoid(self.gate(y)))


class Vit(nn.Module):
    """Patches by a convolution, an encoder layer, a Linear."""

    def __init__(self):
        super().__init__()
        self.patches, self.position = nn.Conv2d(3, 32, 8, 8), nn.Parameter(0.02 * torch.randn(1, 16, 32))
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.layer(x)).mean(1))


def inverted(width, act, gate=None, kernel=3):
    """Return MobileNet's block: 1×1 up, depthwise, perhaps squeeze and excite, 1×1 down, a residual."""
    wide = 2 * width
    middle = [SqueezeExcite(wide, gate)] if gate else []
    layers = (conv(width, wide, 1, act=act), conv(wide, wide, kernel, 1, wide, act), *middle)
    return Residual([*layers, conv(wide, width, 1, act=None)])


CONVOLUTIONAL = {
    "VGG (Simonyan 2014)": lambda: Classifier(
        32, nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(True), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, 1, 1), nn.ReLU(True)
    ),
    "GoogLeNet (Szegedy 2014)": lambda: Classifier(24, conv(3, 16), Mixed()),
    "U-Net (Ronneberger 2015)": UNet,
    "ResNet (He 2015)": lambda: Classifier(
        16, conv(3, 16), Residual([conv(16, 16), conv(16, 16, act=None)], act=nn.ReLU(inplace=True))
    ),
    "ResNet, bottleneck (He 2015)": lambda: Classifier(
        32,
        conv(3, 16),
        Residual([conv(16, 8, 1), conv(8, 8), conv(8, 32, 1, act=None)], conv(16, 32, 1, act=None), nn.ReLU()),
    ),
    "SqueezeNet (Iandola 2016)": lambda: Classifier(
        32, conv(3, 16), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(16, 8, 16)
    ),
    "DenseNet (Huang 2016)": lambda: Classifier(32, nn.Conv2d(3, 16, 3), Dense(), nn.AvgPool2d(2, 2)),
    "ResNeXt (Xie 2016)": lambda: Classifier(
        16, conv(3, 16), Residual([conv(16, 16, 1), conv(16, 16, groups=4), conv(16, 16, 1, act=None)], act=nn.ReLU())
    ),
    "DeepLabV3 (Chen 2017)": DeepLab,
    "CRNN (Shi 2015)": Crnn,
    "SRResNet (Ledig 2016)": SuperResolution,
    "RetinaNet (Lin 2017)": Pyramid,
    "DS-CNN (Zhang 2017)": lambda: Classifier(16, conv(3, 16, 5, 2), conv(16, 16, 3, 1, 16), conv(16, 16, 1)),
    "MobileNetV2 (Sandler 2018)": lambda: Classifier(16, conv(3, 16, 3, 2, act=nn.ReLU6), inverted(16, nn.ReLU6)),
    "ShuffleNetV2 (Ma 2018)": lambda: Classifier(16, conv(3, 16), Shuffle()),
    "Conv-TasNet's block (Luo 2018)": Tcn,
    "MobileNetV3 (Howard 2019)": lambda: Classifier(
        16, conv(3, 16, act=nn.Hardswish), inverted(16, nn.Hardswish, nn.Hardsigmoid(), 5)
    ),
    "EfficientNet (Tan 2019)": lambda: Classifier(16, conv(3, 16, act=nn.SiLU), inverted(16, nn.SiLU, nn.Sigmoid())),
    "YOLOv5 (Jocher 2020)": Yolo,
    "ViT (Dosovitskiy 2020)": Vit,
    "ConvNeXt (Liu 2022)": lambda: Classifier(16, nn.Conv2d(3, 16, 4, 4), ConvNeXt()),
}
"""Each architecture by its name and first paper."""


def make(name):
    """Return a model in eval mode whose normalizations have statistics of their own, and batches to calibrate it on."""
    torch.manual_seed(0)
    model = CONVOLUTIONAL[name]().train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 32, 32))
    return model.eval(), [(torch.randn(4, 3, 32, 32),) for _ in range(4)]
