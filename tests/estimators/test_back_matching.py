"""Back-matching through the optimizer: rates and options."""

from __future__ import annotations

import itertools

import pytest
import torch
from back_matching_nets import ESTIMATORS, backward, batch, factors, make, mlp, rates, train, unit
from cases import copies, same_bits, state_of
from torch import nn

import layerlr
from layerlr.estimators.back_matching import probe as probing
from layerlr.estimators.back_matching import rates as finding
from layerlr.rules import BackMatching


def paper(device="cpu"):
    """A worked example: model, batch, targets."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    model = model.to(device, torch.float64)
    values = ([[1.0, 2.0], [-1.0, 1.0]], [[2.0, -1.0]])
    with torch.no_grad():
        for layer, value in zip(model, values):
            layer.weight.copy_(torch.tensor(value))
    x = torch.tensor([[1.0, 0.0], [2.0, 1.0]], dtype=torch.float64, device=device)
    return model, x, torch.tensor([[1.0], [0.0]], dtype=torch.float64, device=device)


# -- the worked example ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dimension, rate, first",
    [
        ("dim", 4 / 15, [[16 / 3, 2.4], [-8 / 3, -1.2]]),
        ("rank", 2 / 15, [[8 / 3, 1.2], [-4 / 3, -0.6]]),
    ],
)
def test_the_vector_on_every_engine(engine, dimension, rate, first):
    model, x, t = paper(engine.device)
    before = copies(model.parameters())
    rule = BackMatching(dimension=dimension, normalize=None)
    opt = layerlr.SGD(model.parameters(), lr=0.1, rule=rule, backend=engine.backend)
    opt.attach(model)
    (0.5 * (model(x) - t).square()).mean().backward()
    opt.step()
    assert rates(opt, model).tolist() == pytest.approx([rate, 1 / 4.75], rel=1e-12)
    assert opt.layer_stats()["scale"].tolist() == pytest.approx([rate, 1 / 4.75], rel=1e-12)
    steps = [first, [[4.0, -5.5 / 4.75]]]
    for p, w, step in zip(model.parameters(), before, steps):
        wanted = w - 0.1 * torch.tensor(step, dtype=w.dtype, device=w.device)
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(
            p.detach(), w - 0.1 * opt.state[p]["rate"] * p.grad, rtol=1e-12, atol=1e-15
        )


def test_the_vector_of_the_probe(monkeypatch):
    """In the mean over all signs at the two outputs."""
    total = torch.zeros(2, dtype=torch.float64)
    for signs in itertools.product((-1.0, 1.0), repeat=2):
        model, x, t = paper()
        v = torch.tensor(signs, dtype=torch.float64).view(2, 1)
        monkeypatch.setattr(probing, "_signs", lambda y, draw, v=v: v)
        opt = make(model, "probe", normalize=None)
        (0.5 * (model(x) - t).square()).mean().backward()
        opt.step()
        total += 1 / rates(opt, model)
    assert (total / 4).tolist() == pytest.approx([3.75, 4.75], rel=1e-12)


# -- options -------------------------------------------------------------------------------------


def test_normalize():
    model = mlp()
    c = factors(model, batch(0))
    for normalize, wanted in (("mean", unit(c)), ("last", c[-1] / c), (None, 1 / c)):
        opt = make(model, normalize=normalize, lr=0.0)
        train(opt, model, 1)
        torch.testing.assert_close(rates(opt, model), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalize", ["mean", None])
def test_bounds_hold_after_the_rescaling(normalize):
    model = mlp()
    c = factors(model, batch(0))
    free = unit(c) if normalize else 1 / c
    assert free.max() > 1.25 and (free.min() < 0.8 or normalize is None)
    opt = make(model, normalize=normalize, min_factor=0.8, max_factor=1.25, lr=0.0)
    train(opt, model, 1)
    torch.testing.assert_close(rates(opt, model), free.clamp(0.8, 1.25), rtol=1e-12, atol=0)


@pytest.mark.parametrize("refresh", [None, 3])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_refresh(estimator, refresh):
    """Between estimates the rates stay, and a step does not run the model."""
    model = mlp()
    opt = make(model, estimator, **({} if refresh is None else {"refresh": refresh}))
    runs, seen = [], [torch.zeros(4, dtype=torch.float64)]
    model[2].register_forward_hook(lambda *_: runs.append(1))
    for step in range(12):
        backward(model, step)
        runs.clear()
        opt.step()
        seen.append(rates(opt, model))
        due = step % (refresh or 10) == 0
        assert len(runs) == due
        assert torch.equal(*seen[-2:]) != due


def test_running_mean_by_hand():
    model = mlp()
    opt = make(model, ema=0.5, refresh=1, normalize=None)
    mean, weight = torch.zeros(4, dtype=torch.float64), 0.0
    for step in range(3):
        c = factors(model, batch(step))
        backward(model, step)
        opt.step()
        mean, weight = 0.5 * mean + 0.5 * c, 0.5 * weight + 0.5
        torch.testing.assert_close(rates(opt, model), weight / mean, rtol=1e-12, atol=0)
        for k, p in enumerate(model.parameters()):
            assert opt.state[p]["estimate"].item() == pytest.approx(mean[k].item(), rel=1e-12)
            assert opt.state[p]["estimate_weight"].item() == weight


def test_a_module_is_one_layer():
    """Weight and bias have the mean over their elements."""
    model = mlp()
    c = factors(model, batch(0))
    joint = torch.stack([(12 * c[0] + 4 * c[1]) / 16, (8 * c[2] + 2 * c[3]) / 10])
    rule = BackMatching(normalize=None)
    opt = layerlr.SGD(model.named_parameters(), lr=0.0, rule=rule, layers="module")
    opt.attach(model)
    train(opt, model, 1)
    scale = opt.layer_stats()["scale"]
    torch.testing.assert_close(scale, 1 / joint, rtol=1e-12, atol=0)
    assert opt.state[model[0].weight]["rate"].item() == scale[0].item()


def test_parts_of_a_tensor(monkeypatch):
    """Parts share their tensor's structural factor; a probe sees each of them."""
    model, x, _ = paper()
    v = torch.ones(2, 1, dtype=torch.float64)
    monkeypatch.setattr(probing, "_signs", lambda y, draw: v)
    for estimator in ESTIMATORS:
        rule = BackMatching(estimator, normalize=None)
        opt = layerlr.SGD([{"params": [model[0].weight], "split": 2}], lr=0.0, rule=rule)
        opt.attach(model)
        model(x).sum().backward()
        opt.step()
        # J^T v = W2^T (sum of x) = (2, -1)^T (3, 1); over 2 samples and 2 elements
        wanted = [3.75, 3.75] if estimator == "structural" else [40 / 4, 10 / 4]
        assert (1 / opt.state[model[0].weight]["rate"]).tolist() == pytest.approx(wanted, rel=1e-12)


def grouped(model, first_rule, **second):
    first, _, last = model
    opt = layerlr.SGD(
        [
            {"params": list(first.parameters())},
            {"params": list(last.parameters()), "lr": 0.01, **second},
        ],
        lr=0.05,
        rule=first_rule,
    )
    opt.attach(model)
    return opt


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_groups_of_one_rule_share_an_estimate(estimator, monkeypatch):
    runs = []
    find = f"_{estimator}" if estimator == "structural" else "_probe"
    real = getattr(finding, find)
    monkeypatch.setattr(finding, find, lambda *a: runs.append(1) or real(*a))
    model, twin = mlp(), mlp()
    several, one = grouped(model, BackMatching(estimator)), make(twin, estimator)
    train(several, model, 1)
    assert len(runs) == 1
    train(one, twin, 1)
    torch.testing.assert_close(rates(several, model), rates(one, twin), rtol=1e-12, atol=0)
    assert rates(several, model).log().mean().item() == pytest.approx(0.0, abs=1e-12)


def test_groups_of_two_rules(monkeypatch):
    model = mlp()
    c = factors(model, batch(0))
    opt = grouped(model, BackMatching(), rule=BackMatching(normalize=None))
    train(opt, model, 1)
    wanted = torch.cat([unit(c[:2]), 1 / c[2:]])
    torch.testing.assert_close(rates(opt, model), wanted, rtol=1e-12, atol=0)


def test_a_group_without_the_rule_takes_the_plain_step():
    model = mlp()
    opt = grouped(model, BackMatching(), rule=None)
    last = model[2].weight
    before = last.detach().clone()
    train(opt, model, 1)
    torch.testing.assert_close(last.detach(), before - 0.01 * last.grad, rtol=1e-14, atol=0)
    assert "rate" not in opt.state[last] and "estimated" not in opt.param_groups[1]
    assert opt.param_groups[0]["estimated"] == 1


def test_an_empty_group():
    model = mlp()
    groups = [{"params": list(model.parameters())}, {"params": []}]
    opt = layerlr.SGD(groups, lr=0.05, rule="backmatching")
    opt.attach(model)
    train(opt, model, 2)
    assert [g["estimated"] for g in opt.param_groups] == [2, 2]


def test_kernels_alone():
    model = mlp()
    c = factors(model, batch(0))
    before = copies(model.parameters())
    opt = layerlr.SGD(model.parameters(), lr=0.05, rule="backmatching", adapt="kernels")
    opt.attach(model)
    train(opt, model, 1)
    for k, wanted in zip((0, 2), unit(c[[0, 2]])):
        p = list(model.parameters())[k]
        assert opt.state[p]["rate"].item() == pytest.approx(wanted.item(), rel=1e-12)
    for k in (1, 3):
        p = list(model.parameters())[k]
        assert "rate" not in opt.state[p]
        torch.testing.assert_close(p.detach(), before[k] - 0.05 * p.grad, rtol=1e-14, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_frozen_parameters_have_no_part(estimator):
    model = mlp()
    model[0].requires_grad_(False)
    before = copies(model[0].parameters())
    opt = make(model, estimator, ema=0.0, refresh=1)
    train(opt, model, 2)
    assert same_bits(model[0].parameters(), before) and model[0].weight not in opt.state
    mine = torch.cat([opt.state[p]["rate"] for p in model[2].parameters()])
    assert mine.log().mean().item() == pytest.approx(0.0, abs=1e-12)
    model[0].requires_grad_(True)
    train(opt, model, 1, first=2)
    assert rates(opt, model).log().mean().item() == pytest.approx(0.0, abs=1e-12)
    if estimator == "structural":
        assert not same_bits(model[0].parameters(), before)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_parameter_without_gradient_keeps_its_mean(estimator):
    model = mlp()
    bias = model[0].bias
    opt = make(model, estimator, refresh=1)
    train(opt, model, 1)
    known = state_of(opt, bias)
    backward(model, 1)
    bias.grad = None
    before = bias.detach().clone()
    opt.step()
    assert torch.equal(bias, before)
    now = state_of(opt, bias)
    assert all(torch.equal(now[k], known[k]) for k in ("estimate", "estimate_weight"))
    assert opt.state[model[0].weight]["estimate_weight"].item() == pytest.approx(0.19)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("normalize", ["mean", "last", None])
def test_a_dead_layer_has_the_mean_rate(estimator, normalize):
    """Behind a zero: no estimate of its own, and no say in those of the others."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model.double()
    nn.init.zeros_(model[1].weight)
    opt = make(model, estimator, normalize=normalize, max_factor=1e6)
    backward(model)
    before = copies(model.parameters())
    opt.step()
    found = rates(opt, model)
    weight = torch.cat([opt.state[p]["estimate_weight"] for p in model.parameters()])
    assert (weight == 0).tolist() == [True, True] + [False] * 6
    middle = found[2:].log().mean().exp()
    torch.testing.assert_close(found[:2], middle.expand(2), rtol=1e-12, atol=0)
    if normalize == "mean":
        assert middle.item() == pytest.approx(1.0, rel=1e-12)
    if normalize == "last":
        assert found[-1].item() == 1.0
    assert all(torch.equal(p, w) for p, w in zip(model[0].parameters(), before))
    with torch.no_grad():
        model[1].weight.fill_(0.5)
    opt.param_groups[0]["estimated"] = 0
    train(opt, model, 1)
    assert all(opt.state[p]["estimate_weight"] > 0 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_noise_is_no_estimate(dtype):
    """A batch norm takes away the bias before it: its gradient is what rounding leaves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    opt = make(model, "probe")
    train(opt, model, 1)
    weight = torch.cat([opt.state[p]["estimate_weight"] for p in model.parameters()])
    assert (weight == 0).tolist() == [False, True, False, False, False, False]
    found = rates(opt, model)
    assert found[1].item() == pytest.approx(1.0, rel=1e-12)
    assert found.log().sum().item() == pytest.approx(0.0, abs=1e-12)


def test_a_tensor_without_elements():
    model = mlp()
    opt = make(model, "probe", normalize=None)
    empty = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
    opt.add_param_group({"params": [("empty", empty)]})
    backward(model)
    empty.grad = torch.zeros_like(empty)
    opt.step()
    assert torch.isfinite(rates(opt, model)).all()
    assert opt.state[empty]["estimate_weight"].item() == 0


def test_nothing_alive():
    model = mlp()
    for p in model.parameters():
        nn.init.zeros_(p)
    opt = make(model, "probe")
    for p in model[0].parameters():
        p.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    backward(model)
    opt.step()
    assert opt.state[model[2].weight]["rate"].item() == 1.0


def test_tiny_estimates_are_floored_and_clamped():
    model = mlp()
    with torch.no_grad():
        model[2].weight.fill_(3e-5)
    opt = make(model, normalize=None, lr=0.0)
    train(opt, model, 1)
    found = rates(opt, model)
    assert found[:2].tolist() == [1e3, 1e3] and found[3].item() == 1.0
    first = nn.Linear(3, 1, bias=False).double()
    opt = make(first, normalize=None, max_factor=float("inf"))
    first(batch(0) * 1e-7).sum().backward()
    opt.step()
    assert opt.state[first.weight]["rate"].item() == pytest.approx(1e12, rel=1e-12)


def test_an_estimate_that_is_not_finite_is_left_out():
    model = mlp()
    opt = make(model, refresh=1)
    train(opt, model, 1)
    known = [state_of(opt, p) for p in model.parameters()]
    x = batch(1)
    x[0, 0] = float("inf")
    model(x).square().mean().backward()
    opt.step()
    for p, old in zip(model.parameters(), known):
        now = state_of(opt, p)
        assert torch.isfinite(now["rate"]).all() and torch.isfinite(now["estimate"]).all()
        if p is model[0].weight:
            assert torch.equal(now["estimate"], old["estimate"])


def test_a_parameter_outside_the_model_is_named():
    model = mlp()
    stray = nn.Parameter(torch.ones(2, dtype=torch.float64))
    named = [*model.named_parameters(), ("stray", stray)]
    opt = layerlr.SGD(named, lr=0.1, rule="backmatching")
    opt.attach(model)
    backward(model)
    stray.grad = torch.ones_like(stray)
    before = copies([*model.parameters(), stray])
    with pytest.raises(ValueError, match=r"'stray' .* no part in the attached model's graph"):
        opt.step()
    assert same_bits(before, [*model.parameters(), stray])


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "exact"},
        {"dimension": "full"},
        {"normalize": "first"},
        {"min_factor": 0.0},
        {"min_factor": 2.0},
        {"max_factor": 0.5},
        {"max_factor": float("nan")},
        {"ema": 1.0},
        {"refresh": 0},
        {"refresh": 2.5},
        {"seed": -1},
    ],
)
def test_options_that_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        BackMatching(**options)
