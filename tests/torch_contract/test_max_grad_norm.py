"""``max_grad_norm``: clipping inside the step, against torch's before it."""

import copy

import pytest
import torch

import layerlr
from layerlr import rules

MAKE = {
    "sgd": lambda p, **k: layerlr.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, **k),
    "adam": lambda p, **k: layerlr.Adam(p, lr=0.1, weight_decay=0.01, **k),
    "adamw": lambda p, **k: layerlr.AdamW(p, lr=0.1, **k),
}


def pair(dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    a = [
        torch.nn.Parameter(torch.randn(*s, dtype=dtype).to(device)) for s in ((5, 3), (4,), (7, 2))
    ]
    return a, copy.deepcopy(a)


def fill(params, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator, dtype=torch.float64) * size).to(p)


@pytest.mark.parametrize("rule", [None, "singh", "lars", "layca", "lamb"])
@pytest.mark.parametrize("name", MAKE)
def test_equals_clipping_before_the_step(engine, name, rule):
    a, b = pair(device=engine.device)
    ours = MAKE[name](a, rule=rule, max_grad_norm=1.5, backend=engine.backend)
    plain = MAKE[name](b, rule=rule, backend=engine.backend)
    for step, size in enumerate((3.0, 0.01, 1.0)):
        fill(a, size, step)
        fill(b, size, step)
        before = [p.grad.clone() for p in a]
        ours.step()
        norm = torch.nn.utils.clip_grad_norm_(b, 1.5)
        plain.step()
        torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-12, atol=0)
        for p, q, g in zip(a, b, before, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)
            assert torch.equal(p.grad, g)


def test_below_the_bound_no_bit_differs(engine):
    a, b = pair(torch.float32, engine.device)
    ours = MAKE["adam"](a, rule="lamb", max_grad_norm=100.0, backend=engine.backend)
    plain = MAKE["adam"](b, rule="lamb", backend=engine.backend)
    for params, opt in ((a, ours), (b, plain)):
        fill(params, 1.0)
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_one_norm_over_the_groups_that_have_a_bound(engine):
    a, b = pair(device=engine.device)
    groups = [
        {"params": a[:1], "max_grad_norm": 1.0},
        {"params": a[1:2]},
        {"params": a[2:], "max_grad_norm": 0.5},
    ]
    opt = layerlr.SGD(groups, lr=1.0, backend=engine.backend)
    fill(a, 3.0)
    fill(b, 3.0)
    norm = (b[0].grad.square().sum() + b[2].grad.square().sum()).sqrt()
    opt.step()
    torch.testing.assert_close(opt.grad_norm, norm)
    for p, q, bound in zip(a, b, (1.0, None, 0.5), strict=True):
        factor = 1.0 if bound is None else bound / (norm + 1e-6)
        torch.testing.assert_close(p, q - factor * q.grad)
    for group in opt.param_groups:
        group["max_grad_norm"] = None
    opt.step()
    assert opt.grad_norm is None


def test_a_scheduled_bound_takes_effect(engine):
    p = torch.nn.Parameter(torch.zeros(4, device=engine.device))
    opt = layerlr.SGD([p], lr=1.0, max_grad_norm=1.0, backend=engine.backend)
    p.grad = torch.full_like(p, 3.0)
    opt.step()
    opt.param_groups[0]["max_grad_norm"] = 2.0
    opt.step()
    torch.testing.assert_close(p, torch.full_like(p, -1.5), rtol=1e-5, atol=0)


def test_a_skipped_layer_counts_nothing(engine):
    a, b = pair(device=engine.device)
    opt = layerlr.SGD(a, lr=1.0, rule="singh", max_grad_norm=1.0, backend=engine.backend)
    fill(a, 3.0)
    a[1].grad[0] = float("nan")
    norm = (a[0].grad.square().sum() + a[2].grad.square().sum()).sqrt()
    opt.step()
    torch.testing.assert_close(opt.grad_norm, norm)
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], b[0]) and torch.isfinite(a[0]).all()


def test_without_skip_a_bad_gradient_spoils_all_as_torchs(engine):
    a, _ = pair(device=engine.device)
    opt = layerlr.SGD(a, lr=1.0, max_grad_norm=1.0, backend=engine.backend)
    fill(a, 3.0)
    a[1].grad[0] = float("nan")
    opt.step()
    assert all(torch.isnan(p).all() for p in a)


def test_unscales_first(engine):
    a, b = pair(torch.float32, engine.device)
    scaler = torch.amp.GradScaler(engine.device, init_scale=1024.0)
    ours = layerlr.SGD(a, lr=1.0, max_grad_norm=1.0, fused=True, backend=engine.backend)
    scaler.scale(torch.zeros((), device=engine.device))  # makes the scale
    fill(a, 3.0)
    fill(b, 3.0)
    for p in a:
        p.grad *= 1024.0
    scaler.step(ours)
    norm = torch.nn.utils.clip_grad_norm_(b, 1.0)
    torch.testing.assert_close(ours.grad_norm.float(), norm)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q - q.grad)


def test_state_dict_and_copies_keep_the_bound():
    a, b = pair()
    opt = layerlr.SGD(a, lr=1.0, max_grad_norm=1.0)
    again = layerlr.SGD(b, lr=1.0)
    again.load_state_dict(opt.state_dict())
    assert again.param_groups[0]["max_grad_norm"] == 1.0
    assert copy.deepcopy(opt).param_groups[0]["max_grad_norm"] == 1.0
    old = opt.state_dict()
    del old["param_groups"][0]["max_grad_norm"]  # of a version that had none
    opt.load_state_dict(old)
    assert opt.param_groups[0]["max_grad_norm"] == 1.0


def test_a_bound_of_0_is_none():
    """As Hugging Face, Lightning and nanoGPT write it."""
    a, b = pair()
    off, none = layerlr.SGD(a, lr=1.0, max_grad_norm=0.0), layerlr.SGD(b, lr=1.0)
    for params, opt in ((a, off), (b, none)):
        fill(params, 3.0)
        opt.step()
    assert off.grad_norm is None
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_refuses_a_bound_that_is_none(bad):
    a, _ = pair()
    with pytest.raises(ValueError, match="max_grad_norm"):
        layerlr.SGD(a, max_grad_norm=bad)
    opt = layerlr.SGD(a)
    fill(a, 1.0)
    opt.param_groups[0]["max_grad_norm"] = bad
    before = [p.detach().clone() for p in a]
    with pytest.raises(ValueError, match="max_grad_norm"):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(a, before, strict=True))


@pytest.mark.parametrize("rule", [rules.Curvature(), rules.BackMatching()], ids=lambda r: r.name)
def test_refuses_rules_whose_rates_are_of_the_unclipped_step(rule):
    a, _ = pair()
    with pytest.raises(ValueError, match="max_grad_norm"):
        layerlr.SGD(a, lr=1.0, rule=rule, max_grad_norm=1.0)
