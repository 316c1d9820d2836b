"""Rates that are set from outside: every layer takes its own, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

import layerlr


def fixed(device, *shapes):
    torch.manual_seed(0)
    params = [Parameter(torch.randn(s, dtype=torch.float64, device=device)) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def test_each_layer_has_its_rate(engine):
    params = fixed(engine.device, (3, 4), (5,), (2, 2))
    before = [p.detach().clone() for p in params]
    opt = layerlr.SGD(params, lr=0.1, rule="rated", backend=engine.backend)
    for k, p in enumerate(params):
        opt.state[p]["rate"].fill_(k + 0.25)
    opt.step()
    for k, (p, w) in enumerate(zip(params, before, strict=True)):
        torch.testing.assert_close(p.detach(), w - 0.1 * (k + 0.25) * p.grad, rtol=1e-14, atol=0)
    stats = opt.layer_stats()
    assert stats["scale"].tolist() == [0.25, 1.25, 2.25]
    assert stats["lr"].tolist() == pytest.approx([0.025, 0.125, 0.225], rel=1e-15)


def test_parts_of_a_tensor_have_rates_of_their_own(engine):
    (p,) = fixed(engine.device, (4, 3))
    before = p.detach().clone()
    opt = layerlr.SGD(
        [{"params": [p], "split": [1, 3]}], lr=0.1, rule="rated", backend=engine.backend
    )
    opt.state[p]["rate"].copy_(torch.tensor([2.0, 0.0]))
    opt.step()
    torch.testing.assert_close(p[:1], before[:1] - 0.2 * p.grad[:1], rtol=1e-14, atol=0)
    assert torch.equal(p[1:], before[1:])


@pytest.mark.parametrize("missing", ["gradient", "state"])
def test_the_first_parameter_of_a_layer_need_not_take_part(engine, missing):
    """Its rate counts although it has no gradient; where it is frozen, the next one's does."""
    weight, bias = fixed(engine.device, (2, 3), (2,))
    if missing == "state":
        weight.requires_grad_(False)
    weight.grad = None
    before = [weight.detach().clone(), bias.detach().clone()]
    named = [("a.weight", weight), ("a.bias", bias)]
    opt = layerlr.SGD(named, lr=0.1, rule="rated", layers="module", backend=engine.backend)
    for k, p in enumerate((weight, bias)):
        if p in opt.state:
            opt.state[p]["rate"].fill_(k + 0.5)
    opt.step()
    rate = 0.5 if missing == "gradient" else 1.5
    assert torch.equal(weight, before[0])
    torch.testing.assert_close(
        bias.detach(), before[1] - 0.1 * rate * bias.grad, rtol=1e-14, atol=0
    )


def test_a_compiled_step_takes_the_rates():
    (p,) = fixed("cpu", (4, 3))
    before = p.detach().clone()
    opt = layerlr.SGD([p], lr=0.1, rule="rated", backend="cpu")
    opt.state[p]["rate"].fill_(3.0)
    torch.compile(opt.step, backend="eager")()
    torch.testing.assert_close(p.detach(), before - 0.3 * p.grad, rtol=1e-14, atol=0)


def test_state_dict_holds_the_rates():
    (p,) = fixed("cpu", (4, 3))
    opt = layerlr.SGD([p], lr=0.1, rule="rated")
    opt.state[p]["rate"].fill_(3.0)
    again = layerlr.SGD([p], lr=0.1, rule="rated")
    again.load_state_dict(opt.state_dict())
    assert again.state[p]["rate"].tolist() == [3.0]


FORMS = {
    "a column": lambda x: torch.stack([x, x - 9], 1)[:, 0],
    "one number": lambda x: x[:1].expand(4),
    "negated": lambda x: torch._neg_view(-x),
}


@pytest.mark.parametrize("form", FORMS)
def test_rates_in_whatever_form(engine, form):
    """They are the user's to set; engines read them one after another."""
    (p,) = fixed(engine.device, (4, 3))
    before = p.detach().clone()
    group = {"params": [p], "split": 4}
    opt = layerlr.SGD([group], lr=0.1, rule="rated", backend=engine.backend)
    rates = FORMS[form](torch.arange(1.0, 5.0, dtype=torch.float64, device=engine.device))
    opt.state[p]["rate"] = rates
    opt.step()
    torch.testing.assert_close(p.detach(), before - 0.1 * rates[:, None] * p.grad)
