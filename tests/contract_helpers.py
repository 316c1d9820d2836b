"""What the tests of torch's contract share: classes beside their twins, toy training, oracles."""

from __future__ import annotations

import io

import pytest
import torch
from cases import DIRECTION_ROWS, bits, random
from torch.nn import Parameter

import layerlr
from layerlr import backends, rules


class Twin(torch.optim.Optimizer):
    """A twin that torch.optim lacks, written as torch writes its own."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, -p.grad if group["maximize"] else p.grad, group)
        return loss


class AMomSGD(Twin):
    """SGD with averaged momentum."""

    def __init__(self, params, lr=1e-3, momentum=0.9, weight_decay=0, *, maximize=False):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"maximize": maximize})

    def update(self, p, g, group):
        g = g.add(p, alpha=group["weight_decay"])
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        state["momentum_buffer"].lerp_(g, 1 - group["momentum"])
        p.add_(state["momentum_buffer"], alpha=-float(group["lr"]))


class Lion(Twin):
    """Lion as its authors write it, from the old momentum; NaN stays NaN."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, maximize=False):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"maximize": maximize})

    def update(self, p, g, group):
        lr, (b1, b2) = float(group["lr"]), map(float, group["betas"])
        m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
        c = m.lerp(g, 1 - b1)
        p.mul_(1 - lr * group["weight_decay"])
        p.sub_(torch.where(c.isnan(), c, c.sign()), alpha=lr)
        m.lerp_(g, 1 - b2)


#: ours -> the optimizer that it equals without a rule
TWINS = {
    layerlr.SGD: torch.optim.SGD,
    layerlr.AMomSGD: AMomSGD,
    layerlr.Adagrad: torch.optim.Adagrad,
    layerlr.RMSprop: torch.optim.RMSprop,
    layerlr.Adam: torch.optim.Adam,
    layerlr.AdamW: torch.optim.AdamW,
    layerlr.Lion: Lion,
}
IN_TORCH = {ours: twin for ours, twin in TWINS.items() if twin not in (AMomSGD, Lion)}
CLASSES = list(TWINS)

#: every direction: name -> class and arguments, a row of the table
VARIANTS = {
    name: DIRECTION_ROWS[row][1:]
    for name, row in {
        "sgd": "sgd",
        "momentum": "mom",
        "dampened": "damp",
        "nesterov": "nag",
        "amom": "amom",
        "adagrad": "adagrad",
        "rmsprop": "rms",
        "rmsprop_all": "rms-cm",
        "adam": "adam",
        "amsgrad": "ams",
        "adamw": "adamw",
        "lion": "lion",
    }.items()
}


def _takes_the_host(backend):
    """Whether a backend takes parameters in the memory of the host, where these tests are."""
    try:
        layerlr.SGD([Parameter(torch.ones(1))], backend=backend)
    except RuntimeError:
        return False
    return True


RULES = [None, *(name for name in rules.RULES if name in rules.KNOWN and name != "plain")]
#: without Triton: interpreted, it would take minutes, and its table is held to the others' anyway
BACKENDS = [name for name in backends.BACKENDS if name != "triton" and _takes_the_host(name)]

each_class = pytest.mark.parametrize("ours", CLASSES, ids=lambda c: c.__name__)
each_variant = pytest.mark.parametrize("variant", VARIANTS)
#: state of their own or none; what else a rule does is no question of torch's contract
each_rule = pytest.mark.parametrize("rule", [None, "lars", "layca", "rated"])
each_backend = pytest.mark.parametrize("backend", BACKENDS)
#: for what Python does before any engine sees it
one_backend = pytest.mark.parametrize("backend", BACKENDS[:1])

SHAPES = ((4, 3), (4,), (2, 4), (2,))


def weights(dtype=torch.float64, shapes=SHAPES):
    """Parameters of a small network, always the same."""
    return [Parameter(x) for x in random(shapes, dtype, seed=7)]


def named(params):
    kinds = ("weight", "bias")
    return [(f"layer{i // 2}.{kinds[i % 2]}", p) for i, p in enumerate(params)]


def make(variant, params, rule=None, **kwargs):
    cls, arguments = VARIANTS[variant]
    return cls(params, **{**arguments, **kwargs}, rule=rule)


def make_twin(variant, params, **kwargs):
    cls, arguments = VARIANTS[variant]
    return TWINS[cls](params, **{**arguments, **kwargs})


def photograph(opt):
    """Bits of all weights and state, and every other value of the groups."""
    flat = [p for group in opt.param_groups for p in group["params"]]
    return {
        "weights": [bits(p) for p in flat],
        "state": [
            {k: (v.dtype, bits(v)) for k, v in opt.state[p].items()} if p in opt.state else None
            for p in flat
        ],
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups],
    }


def same(a, b):
    """Whether two nests of tensors and plain values are equal, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(bits(a), bits(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def outcome(build):
    """Type and words of what is raised, or None."""
    try:
        build()
    except Exception as error:
        return type(error), str(error)
    return None


def through_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_close(ours, theirs):
    """Equal to rounding in float64; what is wrong differs by far more."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-11, atol=1e-13)
