"""The papers' networks, modules in forward order; like `bench.models`, drawn from torch's seed.

Layca's networks have no biases and norms without weights. Keras' batch normalisation (eps 1e-3,
momentum 0.99 unless said) is torch's with momentum 1 - 0.99.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- Caffe's networks (Singh et al.) ---


class WithinChannelNorm(nn.Module):
    """Caffe's local response norm over a 3x3 window of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 5e-5 * F.avg_pool2d(x * x, 3, 1, 1)) ** -0.75


def _seen_smaller(shrink: int) -> OrderedDict[str, nn.Module]:
    """The first layer of a network that sees images `shrink` times smaller, none for 1."""
    return OrderedDict({"shrink": nn.AvgPool2d(shrink)} if shrink > 1 else {})


def cifar10_full(shape: tuple[int, ...], classes: int, shrink: int = 1) -> nn.Module:
    """Caffe's cifar10_full, for pixels of 0..255 minus the mean image.

    `shrink`: see `_seen_smaller`.
    """
    channels, height, width = shape
    side = [-(-size // (8 * shrink)) for size in (height, width)]
    layers = _seen_smaller(shrink)
    layers.update(
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
    shrink: int = 1,
) -> nn.Module:
    """Stages of `depth` 3x3 convolutions (conv, ReLU, norm), halved in between; mean, dense.

    The defaults are C10-CNN1, 25 kernels; ``(32, ..., 512), depth=2`` is tiny-CNN, 11 kernels.
    `shrink`: see `_seen_smaller`.
    """
    layers = _seen_smaller(shrink)
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


# --- of Bahamou and Goldfarb, and of Zhang et al. ---


def autoencoder(size: int, hidden: Sequence[int] = (1000, 500, 250), code: int = 30) -> nn.Module:
    """Dense layers down to the code and up again, ReLU between them; the code is linear."""
    widths = [size, *hidden, code, *reversed(hidden), size]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (width, following) in enumerate(pairwise(widths), 1):
        layers[f"dense{i}"] = nn.Linear(width, following)
        if i not in (len(hidden) + 1, len(widths) - 1):
            layers[f"relu{i}"] = nn.ReLU()
    return _he(nn.Sequential(layers))


def batch_vgg(
    shape: tuple[int, ...],
    classes: int,
    stages: Sequence[tuple[int, int]],
    scale: float = 1.0,
    shrink: int = 1,
) -> nn.Module:
    """Stages of (depth, width): convolutions (conv, norm, ReLU), halved after each; dense.

    ``scale`` is a factor on every width; `shrink`: see `_seen_smaller`.
    """
    layers = _seen_smaller(shrink)
    channels = shape[0]
    for stage, (depth, width) in enumerate(stages, 1):
        width = max(round(scale * width), 1)
        for i in range(1, depth + 1):
            layers[f"conv{stage}_{i}"] = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            layers[f"norm{stage}_{i}"] = nn.BatchNorm2d(width)
            layers[f"relu{stage}_{i}"] = nn.ReLU()
            channels = width
        layers[f"pool{stage}"] = nn.MaxPool2d(2)
    height, width = (size // shrink >> len(stages) for size in shape[1:])
    layers["flatten"] = nn.Flatten()
    layers["dense"] = nn.Linear(channels * height * width, classes)
    return _he(nn.Sequential(layers))


VGG13 = ((2, 64), (2, 128), (2, 256), (2, 512), (2, 512))


class SparseLinear(nn.Linear):
    """A dense layer of a sparse matrix; can be differentiated twice, by its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(x, self.weight.mT)


class GCN(nn.Module):
    """Kipf and Welling's: ``A ReLU(A X W0) W1`` of the nodes asked for, dropout before each layer.

    Features X and ``A = D^-1/2 (edges + 1) D^-1/2`` are sparse and constant. `edges` has both
    directions and no loops.
    """

    features: Tensor
    adjacency: Tensor

    def __init__(
        self, features: Tensor, edges: Tensor, classes: int, hidden: int = 16, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.register_buffer("features", features.to_sparse())
        self.register_buffer("adjacency", normalised_adjacency(edges, features))
        self.dense1 = SparseLinear(features.shape[1], hidden, bias=False, dtype=features.dtype)
        self.dense2 = nn.Linear(hidden, classes, bias=False, dtype=features.dtype)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.dense1, self.dense2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, nodes: Tensor) -> Tensor:
        values = self.dropout(self.features.values())
        x = torch.sparse_coo_tensor(
            self.features.indices(),
            values,
            self.features.shape,
            check_invariants=False,
            is_coalesced=True,
        )
        h = F.relu(torch.sparse.mm(self.adjacency, self.dense1(x)))
        return torch.sparse.mm(self.adjacency, self.dense2(self.dropout(h)))[nodes]


def normalised_adjacency(edges: Tensor, features: Tensor) -> Tensor:
    """``D^-1/2 (edges + 1) D^-1/2``, D its degrees: sparse, of the dtype of the features."""
    nodes = len(features)
    loops = torch.arange(nodes, device=edges.device).expand(2, -1)
    indices = torch.cat([edges, loops], 1)
    root = indices[0].bincount(minlength=nodes).to(features.dtype).rsqrt()
    values = root[indices].prod(0)
    shape = (nodes, nodes)
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True).coalesce()


def _he(model: nn.Sequential) -> nn.Module:
    """Kernels from He's normal distribution, biases 0; norms stay 1 and 0."""
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model
