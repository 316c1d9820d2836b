"""Networks that step inside backward, beside ones that step after it."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import BY_ID, same_bits, same_state, state_of
from torch import nn
from torch.nn import Parameter

import layerlr

#: of the engines that share everything but the kernels, and only in the tests that say so
FEW = ("nag-layca", "adamw-lamb", "nag-singh")
few = pytest.mark.asked(triton=FEW, simt=FEW)
MOM = BY_ID["mom-lars"]


class Net(nn.Module):
    """A plain scale, a fused layer, a tied one, a vector with no gradient of its own at times."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(4, 6, bias=False)
        self.qkv = nn.Linear(6, 18)
        self.norm = nn.LayerNorm(6)
        self.tied = nn.Linear(6, 6)
        self.extra = nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)
        self.gain = Parameter(torch.tensor(1.5))
        self.use_extra = True
        self.to(dtype)

    def forward(self, x):
        q, k, v = self.qkv(self.embed(x)).chunk(3, -1)
        x = self.norm(q * k.tanh() + v)
        x = self.tied(self.tied(x).tanh())
        if self.use_extra:
            x = self.extra(x).tanh() + x
        return self.out(x * self.gain)


def batch(seed, dtype=torch.float32, device="cpu"):
    x = cases.random([(5, 4)], dtype, seed=seed)[0]
    return x.to(device)


def loss_of(net, seed, device="cpu"):
    dtype = net.gain.dtype
    return net(batch(seed, dtype, device)).square().mean() * 3


def groups(net, split=None, device="cpu"):
    """The fused layer in a group of its own; names, so that modules can be layers."""
    net.to(device)
    named = dict(net.named_parameters())
    fused = [(n, p) for n, p in named.items() if n.startswith("qkv")]
    rest = [(n, p) for n, p in named.items() if not n.startswith("qkv")]
    own = {"params": fused, "lr_factor": 0.5}
    return [{"params": rest}, own | ({} if split is None else {"split": split})]


def pair(engine, case, dtype=torch.float32, split=None, **options):
    """Two equal runs: the plain loop's, and the one that steps in backward."""
    nets = Net(dtype), Net(dtype)
    opts = [engine.make(case, groups(net, split, engine.device), **options) for net in nets]
    return nets, opts, layerlr.step_in_backward(nets[1], opts[1])


def equal(nets, opts):
    """Weights, state and statistics, to the bit."""
    assert same_bits(nets[0].parameters(), nets[1].parameters())
    for p, q in zip(nets[0].parameters(), nets[1].parameters()):
        assert same_state(state_of(opts[0], p), state_of(opts[1], q))
    stats = [opt.layer_stats() for opt in opts]
    assert stats[0]["names"] == stats[1]["names"]
    for key in stats[0].keys() - {"names"}:
        assert same_bits([stats[0][key]], [stats[1][key]]), key
    return True


def no_grads(net):
    return all(p.grad is None for p in net.parameters())


def both(nets, opts, seed, device="cpu", step=True):
    """One step of each; returns the loss of the second."""
    loss_of(nets[0], seed, device).backward()
    opts[0].step()
    opts[0].zero_grad()
    loss = loss_of(nets[1], seed, device)
    loss.backward()
    if step:
        opts[1].step()
    return loss


class Half(nn.Module):
    """A layer of two tensors, of which passes may use one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = Parameter(torch.randn(3, 3)), Parameter(torch.randn(3, 3))
        self.use = "ab"

    def forward(self, x):
        for name in self.use:
            x = x @ getattr(self, name)
        return x


def halves(**options):
    nets = Half(), Half()
    opts = [
        layerlr.SGD(
            n.named_parameters(), lr=0.1, momentum=0.9, rule="lars", layers="module", **options
        )
        for n in nets
    ]
    return nets, opts, layerlr.step_in_backward(nets[1], opts[1])
