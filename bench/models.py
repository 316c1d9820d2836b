"""Networks: a name, the shape of an input and the number of classes -> a seeded nn.Module.

Modules are registered in forward order, which is the order in which layer-wise rates by depth and
the rotation plots count layers.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn


def convnet(shape: tuple[int, ...], classes: int) -> nn.Module:
    """The demo's small network: two 3x3 convolutions and two dense layers, biases from 0.

    Images larger than 16x16 are halved by the first convolution, which keeps a step on MNIST to
    a few milliseconds.
    """
    channels, height, width = _image(shape)
    stride = 2 if min(height, width) > 16 else 1
    side = [-(-size // stride) // 4 for size in (height, width)]
    return chain(
        nn.init.kaiming_uniform_,
        conv1=nn.Conv2d(channels, 16, 3, stride=stride, padding=1),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(16, 32, 3, padding=1),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        dense1=nn.Linear(32 * side[0] * side[1], 64),
        relu3=nn.ReLU(),
        dense2=nn.Linear(64, classes),
    )


def lenet(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Caffe's LeNet: no non-linearity after the convolutions, "xavier" filler, biases from 0."""
    channels, height, width = _image(shape)
    side = [((size - 4) // 2 - 4) // 2 for size in (height, width)]
    if min(side) < 1:
        raise ValueError(f"lenet needs inputs of at least 16x16, given {height}x{width}")
    return chain(
        caffe_xavier_,
        conv1=nn.Conv2d(channels, 20, 5),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(20, 50, 5),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        ip1=nn.Linear(50 * side[0] * side[1], 500),
        relu1=nn.ReLU(),
        ip2=nn.Linear(500, classes),
    )


def mlp(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two hidden layers of 128."""
    return chain(
        nn.init.kaiming_uniform_,
        flatten=nn.Flatten(),
        dense1=nn.Linear(math.prod(shape), 128),
        relu1=nn.ReLU(),
        dense2=nn.Linear(128, 128),
        relu2=nn.ReLU(),
        dense3=nn.Linear(128, classes),
    )


MODELS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "convnet": convnet,
    "lenet": lenet,
    "mlp": mlp,
}


def build(name: str, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """Network `name`, its weights drawn from `seed` alone; the caller's random state is kept."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; there are: {', '.join(MODELS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](shape, classes)


def _image(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != 3:
        raise ValueError(f"the network takes images (channels, height, width), given {shape}")
    return shape


def caffe_xavier_(weight: torch.Tensor) -> None:
    # Caffe's XavierFiller looks at the fan-in only: uniform in +-sqrt(3 / fan_in).
    bound = math.sqrt(3.0 / weight[0].numel())
    nn.init.uniform_(weight, -bound, bound)


def chain(init_kernel: Callable[[torch.Tensor], object], **layers: nn.Module) -> nn.Module:
    """Layers one after the other, by name (the plots show it); kernels drawn, biases 0."""
    model = nn.Sequential(OrderedDict(layers))
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            init_kernel(parameter.data)
        else:
            nn.init.zeros_(parameter)
    return model
