"""What the tests of other people's training loops share."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import layerlr


def kernels(name, p):
    """A callable in the groups, which no state dict can carry."""
    return p.ndim >= 2


# class, its arguments; momentum or betas are there for schedulers to write
KINDS = {
    "sgd-singh": (layerlr.SGD, {"lr": 0.05, "momentum": 0.9, "rule": "singh", "adapt": kernels}),
    "sgd-layca": (layerlr.SGD, {"lr": 0.05, "momentum": 0.9, "rule": "layca"}),
    "adamw-layca": (
        layerlr.AdamW,
        {"lr": 0.01, "rule": layerlr.rules.Layca(eps=1e-5), "adapt": kernels},
    ),
    "adamw-lamb": (layerlr.AdamW, {"lr": 0.01, "rule": "lamb"}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
TWINS = {layerlr.SGD: torch.optim.SGD, layerlr.AdamW: torch.optim.AdamW}


def data(n=32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1))


class Net(nn.Module):
    """Kernels, biases and a norm; the answer is what Hugging Face's loop wants."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU())
        self.head = nn.Linear(8, 3)

    def forward(self, x, labels=None):
        logits = self.head(self.body(x))
        loss = None if labels is None else cross_entropy(logits.float(), labels)
        return {"loss": loss, "logits": logits}


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_trained(trained):
    assert all(w.isfinite().all() for w in trained)
    assert not any(torch.equal(a, b) for a, b in zip(trained, weights(Net()), strict=True))


def assert_same(ours, theirs):
    assert_trained(ours)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def bare(kind):
    """A class and its twin of torch, with arguments that both take."""
    cls, arguments = KINDS[kind]
    shared = {k: v for k, v in arguments.items() if k not in ("rule", "adapt")}
    return (cls, shared), (TWINS[cls], shared)
