"""What the tests of other people's training loops share."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from pathlib import Path

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


# -- timm ------------------------------------------------------------------------------------------


def _loaded(name):
    return [key for key in sys.modules if key.split(".")[0] == name]


@contextlib.contextmanager
def timm_installed():
    """timm; without torchvision, which it asks for, what of its training loop needs torch alone."""
    found = importlib.util.find_spec("timm")
    if found is None:
        pytest.skip(reason="timm is not installed")
    before = _loaded("timm")
    try:
        importlib.import_module("timm.optim")
    except (ImportError, RuntimeError):
        for name in _loaded("timm"):
            del sys.modules[name]
        for name in ("timm", "timm.models", "timm.utils"):
            sys.modules[name] = types.ModuleType(name)
            folder = Path(found.origin).parent.joinpath(*name.split(".")[1:])
            sys.modules[name].__path__ = [str(folder)]
        sys.modules["timm.models"].group_parameters = None  # for models with a group_matcher
    yield types.SimpleNamespace(
        optim=importlib.import_module("timm.optim"),
        scheduler=importlib.import_module("timm.scheduler"),
        registry=importlib.import_module("timm.optim._optim_factory"),
        clip=importlib.import_module("timm.utils.clip_grad").dispatch_clip_grad,
    )
    for name in _loaded("timm"):
        if name not in before:
            del sys.modules[name]
