"""Models whose layers turn, and what records them."""

import itertools

import torch
from torch import nn

from layerlr.monitor import LayerRotation


def net(*sizes, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def shake(model, seed, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def one(values, **kwargs):
    """A monitor of one layer, and the layer."""
    weight = nn.Parameter(torch.as_tensor(values, dtype=torch.float64))
    return LayerRotation([("w", weight)], adapt="all", **kwargs), weight


def distance(rotation, weight, values):
    weight.data = torch.as_tensor(values, dtype=weight.dtype)
    rotation.record()
    return rotation.curves().distances[-1, 0].item()


class Writer:
    def __init__(self):
        self.seen = []

    def add_scalar(self, tag, value, step):
        self.seen.append((tag, value, step))
