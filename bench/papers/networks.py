"""The papers' networks, modules in forward order; like `bench.models`, drawn from torch's seed.

Layca's networks have no biases and norms without weights. Keras' batch normalisation (eps 1e-3,
momentum 0.99 unless said) is torch's with momentum 1 - 0.99.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- Caffe's networks (Singh et al.) ---


class WithinChannelNorm(nn.Module):
    """Caffe's local response norm over a 3x3 window of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 5e-5 * F.avg_pool2d(x * x, 3, 1, 1)) ** -0.75


def cifar10_full(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Caffe's cifar10_full, for pixels of 0..255 minus the mean image."""
    channels, height, width = shape
    side = [-(-size // 8) for size in (height, width)]
    layers = OrderedDict(
        conv1=nn.Conv2d(channels, 32, 5, padding=2),
        pool1=nn.MaxPool2d(3, 2, ceil_mode=True),
        relu1=nn.ReLU(),
        norm1=WithinChannelNorm(),
        conv2=nn.Conv2d(32, 32, 5, padding=2),
        relu2=nn.ReLU(),
        pool2=nn.AvgPool2d(3, 2, ceil_mode=True),
        norm2=WithinChannelNorm(),
        conv3=nn.Conv2d(32, 64, 5, padding=2),
        relu3=nn.ReLU(),
        pool3=nn.AvgPool2d(3, 2, ceil_mode=True),
        flatten=nn.Flatten(),
        ip1=nn.Linear(64 * side[0] * side[1], classes),
    )
    return _gaussian(nn.Sequential(layers), {"conv1": 1e-4}, 0.01, {})


def alexnet(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Caffe's AlexNet, for 3x227x227."""
    if tuple(shape) != (3, 227, 227):
        raise ValueError(f"alexnet takes 3x227x227, given {tuple(shape)}")

    def norm() -> nn.Module:
        return nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)

    layers = OrderedDict(
        conv1=nn.Conv2d(3, 96, 11, stride=4),
        relu1=nn.ReLU(),
        norm1=norm(),
        pool1=nn.MaxPool2d(3, 2),
        conv2=nn.Conv2d(96, 256, 5, padding=2, groups=2),
        relu2=nn.ReLU(),
        norm2=norm(),
        pool2=nn.MaxPool2d(3, 2),
        conv3=nn.Conv2d(256, 384, 3, padding=1),
        relu3=nn.ReLU(),
        conv4=nn.Conv2d(384, 384, 3, padding=1, groups=2),
        relu4=nn.ReLU(),
        conv5=nn.Conv2d(384, 256, 3, padding=1, groups=2),
        relu5=nn.ReLU(),
        pool5=nn.MaxPool2d(3, 2),
        flatten=nn.Flatten(),
        fc6=nn.Linear(256 * 6 * 6, 4096),
        relu6=nn.ReLU(),
        drop6=nn.Dropout(0.5),
        fc7=nn.Linear(4096, 4096),
        relu7=nn.ReLU(),
        drop7=nn.Dropout(0.5),
        fc8=nn.Linear(4096, classes),
    )
    biases = dict.fromkeys(("conv2", "conv4", "conv5", "fc6", "fc7"), 0.1)
    return _gaussian(nn.Sequential(layers), {"fc6": 0.005, "fc7": 0.005}, 0.01, biases)


def _gaussian(
    model: nn.Module, deviations: dict[str, float], deviation: float, biases: dict[str, float]
) -> nn.Module:
    for name, layer in model.named_children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=deviations.get(name, deviation))
            nn.init.constant_(layer.bias, biases.get(name, 0.0))
    return model


# --- Layca's networks ---


def vgg(
    shape: tuple[int, ...],
    classes: int,
    widths: Sequence[int] = (32, 64, 128, 256),
    depth: int = 6,
    norm_momentum: float = 0.01,
) -> nn.Module:
    """Stages of `depth` 3x3 convolutions (conv, ReLU, norm), halved in between; mean, dense.

    The defaults are C10-CNN1, 25 kernels; ``(32, ..., 512), depth=2`` is tiny-CNN, 11 kernels.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = shape[0]
    for stage, width in enumerate(widths, 1):
        if stage > 1:
            layers[f"pool{stage - 1}"] = nn.MaxPool2d(2)
        for i in range(1, depth + 1):
            layers[f"conv{stage}_{i}"] = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            layers[f"relu{stage}_{i}"] = nn.ReLU()
            layers[f"norm{stage}_{i}"] = _norm(width, norm_momentum)
            channels = width
    layers["mean"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["dense"] = nn.Linear(channels, classes, bias=False)
    return _drawn(nn.Sequential(layers), nn.init.kaiming_uniform_)


class Block(nn.Module):
    """Two convolutions around which the input goes, through a 1x1 convolution where it shrinks."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        stride = 1 if channels == width else 2
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = _norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = _norm(width)
        self.around: nn.Module = nn.Identity()
        if stride == 2:
            self.around = nn.Conv2d(channels, width, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.around(x))


def resnet32(shape: tuple[int, ...], classes: int) -> nn.Module:
    """ResNet-32 as in Keras' examples (version 1): 34 kernels."""
    stem = nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)
    layers = OrderedDict[str, nn.Module](conv=stem, norm=_norm(16), relu=nn.ReLU())
    channels = 16
    for stage, width in enumerate((16, 32, 64), 1):
        for i in range(1, 6):
            layers[f"block{stage}_{i}"] = Block(channels, width)
            channels = width
    layers["mean"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["dense"] = nn.Linear(64, classes, bias=False)
    return _drawn(nn.Sequential(layers), nn.init.kaiming_normal_)


class RandomFlip(nn.Module):
    """Mirrors each image left to right or not, while training."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        flipped = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
        return torch.where(flipped, x.flip(-1), x)


def wilson(shape: tuple[int, ...], classes: int, dropout: bool = True) -> nn.Module:
    """C10-CNN2, the VGG of Wilson et al. (2017) with flips and dropout: 15 kernels."""
    layers = OrderedDict[str, nn.Module](flip=RandomFlip())
    channels = shape[0]
    stages = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
    for stage, (depth, width) in enumerate(stages, 1):
        for i in range(1, depth + 1):
            layers[f"conv{stage}_{i}"] = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            layers[f"norm{stage}_{i}"] = _norm(width)
            layers[f"relu{stage}_{i}"] = nn.ReLU()
            if dropout and i < depth:
                layers[f"drop{stage}_{i}"] = nn.Dropout(0.3 if stage == 1 else 0.4)
            channels = width
        layers[f"pool{stage}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["drop1"] = nn.Dropout(0.5 if dropout else 0.0)
    layers["dense1"] = nn.Linear(512 * (shape[1] // 32) * (shape[2] // 32), 512, bias=False)
    layers["norm"] = nn.BatchNorm1d(512, eps=1e-3, momentum=0.01, affine=False)
    layers["relu"] = nn.ReLU()
    layers["drop2"] = nn.Dropout(0.5 if dropout else 0.0)
    layers["dense2"] = nn.Linear(512, classes, bias=False)
    return _drawn(nn.Sequential(layers), nn.init.kaiming_normal_)


def _norm(width: int, momentum: float = 0.01) -> nn.Module:
    return nn.BatchNorm2d(width, eps=1e-3, momentum=momentum, affine=False)


def _drawn(model: nn.Module, draw: Callable[..., object]) -> nn.Module:
    for parameter in model.parameters():
        draw(parameter.data, nonlinearity="relu")
    return model
