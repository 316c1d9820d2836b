"""Functions as modules."""

import itertools

import torch
from torch import nn

from layerlr.estimators.back_matching.structural import Structure


class Fn(nn.Module):
    """A module whose forward is the given function of its input (and of itself)."""

    def __init__(self, fn, **members):
        super().__init__()
        self.fn = fn
        for name, value in members.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.fn(self, x) if self.fn.__code__.co_argcount == 2 else self.fn(x)


def identity(x, channels_last):
    """A layer that returns x; the factor of its bias is the number of positions times m."""
    n = x.shape[-1] if channels_last else x.shape[1]
    if channels_last or x.dim() == 2:
        layer = nn.Linear(n, n)
    else:
        layer = (nn.Conv1d if x.dim() == 3 else nn.Conv2d)(n, n, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(n).view_as(layer.weight))
        layer.bias.zero_()
    return layer.to(x), x[0].numel() // n


def shaken(layer, seed=0):
    """Parameters and statistics that are nowhere 0 or 1."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for t in itertools.chain(layer.parameters(), layer.buffers()):
            if t.is_floating_point():
                t.copy_(torch.rand_like(t) + 0.2) if t.dim() < 2 else t.normal_()
    return layer


def entry(layer, x, rank=False, channels_last=False):
    """c_x of a layer, through the bias of an identity before it; and all factors."""
    first, positions = identity(x, channels_last)
    factors = Structure(nn.Sequential(first, layer), rank).factors((x,), {})
    return factors[first.bias].item() / positions, factors


MASK = torch.tensor([[1.0, 0.0, 2.0, 1.0], [0.5, 1.0, 0.0, 3.0], [1.0, 1.0, 1.0, 0.0]]).double()
