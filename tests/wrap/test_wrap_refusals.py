"""What `layerlr.wrap` refuses, and what it says of itself."""

from __future__ import annotations

import pytest
import torch
from cases import copies, random, same_bits, set_grads, train
from torch import nn
from torch.nn import Parameter

import layerlr
from layerlr import rules


def sgd(**kwargs):
    return torch.optim.SGD([Parameter(v) for v in random(((7, 5), (5,)))], lr=0.1, **kwargs)


class NoRate(torch.optim.Optimizer):
    """A base without an lr."""

    def __init__(self):
        super().__init__([Parameter(torch.ones(3, 3))], {})

    def step(self, closure=None):
        """None."""


REFUSED = {
    "no optimizer": (lambda: layerlr.wrap(nn.Linear(2, 2), "layca"), TypeError, "got Linear"),
    "scheduler": (
        lambda: layerlr.wrap(torch.optim.lr_scheduler.ConstantLR(sgd()), "layca"),
        TypeError,
        "got ConstantLR",
    ),
    "LBFGS": (
        lambda: layerlr.wrap(torch.optim.LBFGS([Parameter(torch.ones(3, 3))]), "brake"),
        TypeError,
        "LBFGS takes several steps",
    ),
    "curvature": (lambda: layerlr.wrap(sgd(), "curvature"), ValueError, "use layerlr.SGD"),
    "backmatching": (lambda: layerlr.wrap(sgd(), "backmatching"), ValueError, "use layerlr.SGD"),
    "freeze": (
        lambda: layerlr.wrap(sgd(), rules.Layca(others="freeze"), lr=0.1),
        ValueError,
        "or use others='plain'",
    ),
    "bounds": (
        lambda: layerlr.wrap(NoRate(), rules.Lamb(min_ratio=2.0), lr=0.1),
        ValueError,
        "the base has no lr .* leave the bounds out",
    ),
    "no lr": (lambda: layerlr.wrap(sgd(), "layca"), ValueError, "give lr, the angle or the ratio"),
    "lr 0": (lambda: layerlr.wrap(sgd(), "lamb", lr=0.0), ValueError, "give a nonzero lr"),
    "lr -1": (lambda: layerlr.wrap(sgd(), "lars", lr=-1.0), ValueError, "Invalid learning rate"),
    "rule": (lambda: layerlr.wrap(sgd(), "nonsense"), ValueError, "unknown rule 'nonsense'"),
    "backend": (lambda: layerlr.wrap(sgd(), "lars", backend="x"), ValueError, "unknown backend"),
    "module": (lambda: layerlr.wrap(sgd(), "lars", layers="module"), ValueError, "parameter names"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("rule", ["layca", "lamb", "brake"])
def test_a_step_that_the_base_gives_up(rule):
    """It has stepped the first group by then, at a length that is not the rule's."""
    params = [Parameter(v) for v in random(((7, 5), (6, 4)))]
    base = torch.optim.RMSprop([{"params": [p]} for p in params], lr=0.1)
    opt = layerlr.wrap(base, rule, lr=0.1)
    train(opt, params, 1)
    set_grads(params, 1)
    params[1].grad = params[1].grad.to_sparse()
    before = copies(params)
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert same_bits(params, before)
    train(opt, params, 1)
    assert not same_bits(params, before)


def test_steps_that_would_leave_the_base_out(monkeypatch):
    """Inside backward layers step without the base; a CUDA graph has the base's numbers in it."""
    model = nn.Linear(5, 4)
    opt = layerlr.wrap(torch.optim.SGD(model.parameters(), lr=0.1), "layca", lr=0.1)
    with pytest.raises(TypeError, match="got Wrapped, whose base steps once"):
        layerlr.step_in_backward(model, opt)
    set_grads(list(model.parameters()), 0)
    monkeypatch.setattr("layerlr.devices.capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        opt.step()


def test_lr_0_is_fine_where_the_lr_is_the_bases():
    assert layerlr.wrap(sgd(), "lars", lr=0.0).param_groups[0]["lr"] == 0.0


def test_a_base_that_fails_leaves_the_gradients():
    opt = layerlr.wrap(sgd(), "layca", lr=0.1)
    params = opt.param_groups[0]["params"]
    set_grads(params, 0)
    grads = [p.grad for p in params]

    def fail(*_):
        raise RuntimeError("base")

    hook = opt.base.register_step_post_hook(fail)
    with pytest.raises(RuntimeError, match="base"):
        opt.step()
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert opt.base.param_groups[0]["lr"] == 0.1
    hook.remove()
    train(opt, params, 1)


def test_names():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    named = torch.optim.SGD(model.named_parameters(), lr=0.1)
    bare = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = layerlr.wrap(bare, "lars")
    opt.attach(model)
    for found in (opt, layerlr.wrap(named, "lars")):
        assert found.layer_stats()["names"] == ["0.weight", "1.weight"]
    opt.param_groups[0]["layers"] = "module"
    assert opt.layer_stats()["names"] == ["0", "1"]
    saved = opt.state_dict()
    other = layerlr.wrap(torch.optim.SGD(model.parameters(), lr=0.1), "lars")
    other.attach(model)
    other.load_state_dict(saved)
    train(other, list(model.parameters()), 1)


def test_describe(capsys):
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))
    model[1].bias.requires_grad_(False)
    groups = [
        {"params": list(model[0].named_parameters())},
        {"params": [("1.weight", model[1].weight), ("1.bias", model[1].bias)], "rule": None},
    ]
    base = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.3)
    opt = layerlr.wrap(base, rules.Lamb(), lr=0.05)
    opt.param_groups[0]["lr"] = opt.param_groups[1]["lr"] = 0.025
    lines = [line.split() for line in layerlr.describe(opt).splitlines()[1:]]
    assert [line[0] for line in lines] == ["weight", "bias", "1.weight", "1.bias"]
    assert [line[-4:] for line in lines] == [
        ["adapted", "0.025", "0.3", "cpu"],
        ["base", "0.005", "0.3", "AdamW"],
        ["base", "0.005", "0.3", "AdamW"],
        ["frozen", "0", "0", "-"],
    ]


def stepped(rule, **options):
    base = torch.optim.AdamW([Parameter(v) for v in random(((7, 5), (5,)))], lr=0.1)
    opt = layerlr.wrap(base, rule, **options)
    params = opt.param_groups[0]["params"]
    train(opt, params, 2)
    return base, opt, params


@pytest.mark.parametrize("value", ["1e-3", None, [0.1]], ids=str)
@pytest.mark.parametrize(
    ("rule", "options"), [("layca", {"lr": 0.05}), ("brake", {}), ("lars", {})]
)
def test_a_rate_that_is_none_is_refused_before_the_base_steps(rule, options, value):
    base, opt, params = stepped(rule, **options)
    before, taken = copies(params), float(base.state[params[0]]["step"])
    opt.param_groups[0]["lr"] = value
    with pytest.raises(ValueError, match="Invalid lr of param group 0"):
        opt.step()
    assert same_bits(params, before) and float(base.state[params[0]]["step"]) == taken
    assert base.param_groups[0]["lr"] == 0.1


LATER = [
    (rules.Layca(others="freeze"), "layca", {"lr": 0.05}, "or use others='plain'"),
    ("curvature", "layca", {"lr": 0.05}, "use layerlr.SGD"),
    ("layca", "lars", {}, "lr of param group 0 is the base's: wrap the base again"),
]


@pytest.mark.parametrize(("later", "rule", "options", "words"), LATER)
def test_a_rule_set_later_is_refused_as_at_first(later, rule, options, words):
    _, opt, params = stepped(rule, **options)
    before = copies(params)
    opt.param_groups[0]["rule"] = later
    with pytest.raises(ValueError, match=words):
        opt.step()
    assert same_bits(params, before)


def test_rules_may_change_where_the_lr_stays_what_it_was():
    for rule, options, later in (("layca", {"lr": 0.05}, "hyperball"), ("lars", {}, "singh")):
        _, opt, params = stepped(rule, **options)
        opt.param_groups[0]["rule"] = later
        train(opt, params, 1)


def test_the_base_gets_its_groups_by_the_wrapper():
    base, opt, _ = stepped("layca", lr=0.05)
    base.add_param_group({"params": [Parameter(torch.ones(3, 3))]})
    with pytest.raises(RuntimeError, match="add groups by the wrapper's add_param_group"):
        opt.step()


def test_a_wrappers_state_is_for_wrappers():
    _, opt, params = stepped("brake")
    other = layerlr.AdamW(params, lr=0.1, rule="brake")
    with pytest.raises(ValueError, match=r"state dict of an optimizer of layerlr\.wrap"):
        other.load_state_dict(opt.state_dict())
    assert not other.state[params[0]]["exp_avg"].any()
