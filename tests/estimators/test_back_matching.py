"""Back-matching through the optimizer: rates, options, state, training."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import copies, same_bits, same_state, state_of
from torch import nn

import layerlr
from layerlr.estimators.back_matching import probe as probing
from layerlr.estimators.back_matching import rates as finding
from layerlr.rules import BackMatching, Curvature, Rated

ESTIMATORS = ("structural", "probe")


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


def mlp(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def batch(step, dtype=torch.float64, n=5):
    draw = torch.Generator().manual_seed(step)
    return torch.randn(n, 3, generator=draw, dtype=torch.float64).to(dtype)


def backward(model, step=0):
    p = next(model.parameters())
    model.zero_grad()
    loss = model(batch(step, p.dtype)).square().mean()
    loss.backward()
    return loss.item()


def train(opt, model, steps, first=0):
    for step in range(first, first + steps):
        backward(model, step)
        opt.step()


def make(model, *args, lr=0.05, cls=layerlr.SGD, **options):
    """An optimizer with the rule, attached; options of the rule come as ``BackMatching``'s."""
    opt = cls(model.named_parameters(), lr=lr, rule=BackMatching(*args, **options))
    opt.attach(model)
    return opt


def rates(opt, model):
    return torch.cat([opt.state[p]["rate"].cpu() for p in model.parameters()])


def factors(model, x):
    """c_W*m of each tensor of `mlp`, by hand."""
    first, _, last = model
    with torch.no_grad():
        h = torch.tanh(first(x))
        m = last.weight.square().sum() / 4 * (1 - h.square()).square().mean()
        return torch.stack([x.square().mean() * m, m, h.square().mean(), torch.tensor(1.0)])


def unit(c):
    """Rates 1/c of geometric mean 1."""
    return c.log().mean().exp() / c


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


# -- setting the rule ----------------------------------------------------------------------------


def test_a_rule_that_is_set_by_name_estimates_at_its_first_step():
    model = mlp()
    opt = layerlr.SGD(model.parameters(), lr=0.05)
    opt.attach(model)
    train(opt, model, 1)
    opt.param_groups[0]["rule"] = "backmatching"
    before = copies(model.parameters())
    train(opt, model, 1)
    assert not any(torch.equal(p, w) for p, w in zip(model.parameters(), before))
    assert rates(opt, model).log().mean().item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("between", [Curvature("fisher", likelihood="gaussian"), Rated(), None])
def test_a_rule_that_is_set_anew_starts_afresh(between):
    """Another rule's count and running mean are not this one's."""
    model = mlp()
    opt = make(model)
    train(opt, model, 3)
    opt.param_groups[0]["rule"] = between
    train(opt, model, 1)
    opt.param_groups[0]["rule"] = BackMatching()
    c = factors(model, batch(7))
    train(opt, model, 1, first=7)
    assert opt.param_groups[0]["estimated"] == 1
    torch.testing.assert_close(rates(opt, model), unit(c), rtol=1e-12, atol=0)


def test_other_options_of_the_rule_keep_its_mean():
    model = mlp()
    opt = make(model)
    train(opt, model, 3)
    known = state_of(opt, model[0].weight)
    opt.param_groups[0]["rule"] = BackMatching(refresh=4)
    train(opt, model, 1, first=3)
    assert opt.param_groups[0]["estimated"] == 4
    now = state_of(opt, model[0].weight)
    assert all(torch.equal(now[k], known[k]) for k in ("rate", "estimate", "estimate_weight"))


def test_is_second_order():
    model = mlp()
    every = ["backmatching", BackMatching("probe"), None, "singh", "lars", "lamb", "layca"]
    for rule in every:
        assert not layerlr.SGD(model.parameters(), lr=0.1, rule=rule).is_second_order
    opt = make(model)
    train(opt, model, 1)
    opt.param_groups[0]["rule"] = Curvature(refresh=10)
    assert opt.is_second_order  # due at once, whatever the rule before it had counted
    opt.param_groups[0]["rule"] = "backmatching"
    assert not opt.is_second_order


# -- state ---------------------------------------------------------------------------------------


def reload(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_dict_keys():
    model = mlp(dtype=torch.bfloat16)
    opt = make(model, lr=0.01)
    train(opt, model, 2)
    packed = opt.state_dict()
    assert packed["param_groups"][0]["estimated"] == 2
    assert packed["param_groups"][0]["rule"]["name"] == "backmatching"
    for state in packed["state"].values():
        for key in ("rate", "estimate", "estimate_weight"):
            assert state[key].dtype == torch.float64 and state[key].shape == (1,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_resuming_is_exact(estimator, dtype):
    model = mlp(dtype=dtype)
    opt = make(model, estimator, refresh=2, cls=layerlr.AdamW)
    train(opt, model, 3)
    other = mlp(seed=1, dtype=dtype)
    other.load_state_dict(reload(model.state_dict()))
    resumed = make(other, estimator, refresh=2, cls=layerlr.AdamW)
    resumed.load_state_dict(reload(opt.state_dict()))
    train(opt, model, 5, first=3)
    torch.manual_seed(99)
    train(resumed, other, 5, first=3)
    assert same_bits(model.parameters(), other.parameters())
    for p, q in zip(model.parameters(), other.parameters()):
        assert same_state(state_of(opt, p), state_of(resumed, q))
    assert opt.param_groups[0]["estimated"] == resumed.param_groups[0]["estimated"] == 8


def test_seeds_draw_other_signs():
    found = []
    for seed in (0, 0, 1):
        model = mlp()
        opt = make(model, "probe", seed=seed)
        train(opt, model, 1)
        found.append(rates(opt, model))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    model = mlp()
    opt = make(model, "probe", refresh=1, ema=0.0, lr=0.0)
    train(opt, model, 1)
    first = rates(opt, model)
    backward(model, 0)
    opt.step()
    assert not torch.equal(first, rates(opt, model))  # nor does a step draw those of another


def test_loading_from_torch():
    model = mlp()
    plain = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(plain, model, 2)
    opt = layerlr.SGD(model.parameters(), lr=0.05, momentum=0.9, rule="backmatching")
    opt.attach(model)
    train(opt, model, 3)
    opt.load_state_dict(plain.state_dict())
    assert opt.param_groups[0]["rule"] == BackMatching()
    c = factors(model, batch(5))
    train(opt, model, 1, first=5)
    torch.testing.assert_close(rates(opt, model), unit(c), rtol=1e-12, atol=0)
    assert opt.param_groups[0]["estimated"] == 1


@pytest.mark.parametrize("rule", ["singh", "rated", None])
def test_loading_another_rules_state(rule):
    """The saved rule comes with its state, as ever; the rule that is set then starts afresh."""
    model = mlp()
    saved = layerlr.SGD(model.parameters(), lr=0.05, momentum=0.9, rule=rule)
    train(saved, model, 2)
    opt = layerlr.SGD(model.parameters(), lr=0.05, momentum=0.9, rule="backmatching")
    opt.attach(model)
    train(opt, model, 3)
    opt.load_state_dict(reload(saved.state_dict()))
    assert opt.param_groups[0]["rule"] == layerlr.rules.resolve(rule)
    opt.param_groups[0]["rule"] = BackMatching()
    c = factors(model, batch(5))
    train(opt, model, 1, first=5)
    torch.testing.assert_close(rates(opt, model), unit(c), rtol=1e-12, atol=0)


def test_loading_into_another_rule():
    model = mlp()
    saved = make(model, ema=0.5, refresh=1)
    train(saved, model, 3)
    opt = layerlr.SGD(model.parameters(), lr=0.05)
    opt.load_state_dict(reload(saved.state_dict()))
    assert opt.param_groups[0]["rule"] == saved.param_groups[0]["rule"]
    assert opt.param_groups[0]["estimated"] == 3
    for p in model.parameters():
        assert opt.state[p]["estimate_weight"].item() == 0.875
    opt.attach(model)
    train(opt, model, 1, first=3)
    assert opt.param_groups[0]["estimated"] == 4
    assert opt.state[model[0].weight]["estimate_weight"].item() == 0.9375


def test_a_state_dict_without_the_count():
    model = mlp()
    opt = make(model)
    train(opt, model, 2)
    packed = opt.state_dict()
    del packed["param_groups"][0]["estimated"]
    opt.load_state_dict(packed)
    train(opt, model, 1, first=2)
    assert opt.param_groups[0]["estimated"] == 1
    assert opt.state[model[0].weight]["estimate_weight"].item() == pytest.approx(0.19)


# -- training ------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    """Two convolutions with batch norm, one of them in a residual branch that starts at zero."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.last = nn.Linear(4, 3)
        nn.init.zeros_(self.branch[1].weight)

    def forward(self, x):
        x = self.first(x)
        x = F.relu(x + self.branch(x))
        return self.last(F.avg_pool2d(x, 2).mean((2, 3)))


def images(dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    y = torch.arange(24) % 3
    x = torch.randn(24, 1, 6, 6, generator=draw) * (1.0 + y.view(-1, 1, 1, 1))
    return x.to(dtype), y


@pytest.mark.parametrize("closure", [False, True], ids=["", "closure"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_training_lowers_the_loss(estimator, dtype, closure):
    torch.manual_seed(0)
    model = ConvNet().to(dtype)
    x, y = images(dtype)
    opt = make(model, estimator, lr=0.5, min_factor=0.01, max_factor=20.0, refresh=3)
    losses = []

    def evaluate():
        opt.zero_grad()
        loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        return loss

    for _ in range(30):
        if closure:
            losses.append(opt.step(evaluate).item())
        else:
            losses.append(evaluate().item())
            opt.step()
        found = opt.layer_stats()["scale"]
        assert ((found >= 0.01) & (found <= 20.0)).all()
    assert losses[-1] < losses[0] - 0.1


def test_closure_and_plain_steps_agree():
    runs = []
    for closure in (False, True):
        model = mlp()
        opt = make(model, "probe", refresh=2)
        for step in range(4):
            if closure:
                opt.step(lambda step=step, model=model: backward(model, step))
            else:
                backward(model, step)
                opt.step()
        runs.append(copies(model.parameters()))
    assert same_bits(*runs)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_autocast_batches(estimator):
    """The batch runs again as it ran: float32 weights take it in bfloat16."""
    model = mlp(dtype=torch.float32)
    opt = make(model, estimator)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch(0).bfloat16()).float().square().mean()
    loss.backward()
    opt.step()
    assert not torch.is_autocast_enabled("cpu")
    exact = mlp(dtype=torch.float32)
    plain = make(exact, estimator)
    train(plain, exact, 1)
    torch.testing.assert_close(rates(opt, model), rates(plain, exact), rtol=0.1, atol=0)


def test_half_precision_sums_do_not_overflow(monkeypatch):
    """60000 is a float16, its square is not."""
    monkeypatch.setattr(probing, "_signs", lambda y, draw: torch.ones_like(y))
    model = nn.Linear(1, 1, bias=False).half()
    opt = make(model, "probe", normalize=None, min_factor=1e-12)
    x = torch.full((1, 1), 60000.0, dtype=torch.float16)
    (model(x).float() * 1e-6).sum().backward()
    opt.step()
    wanted = 1 / x.double().square().item()
    assert rates(opt, model).item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("what", ["inside", "around", "step"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_compiled(estimator, what):
    """The model attached and then compiled, compiled and then attached; the step compiled."""
    torch._dynamo.reset()
    model, twin = mlp(), mlp()
    opt, plain = make(model, estimator, refresh=2), make(twin, estimator, refresh=2)
    run = model if what == "step" else torch.compile(model, backend="eager")
    opt.attach(run if what == "around" else model)
    step = torch.compile(opt.step, backend="eager") if what == "step" else opt.step
    for k in range(3):
        opt.zero_grad()
        run(batch(k)).square().mean().backward()
        step()
    train(plain, twin, 3)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(rates(opt, model), rates(plain, twin), rtol=1e-12, atol=0)


def test_tables_show_the_rates():
    model = mlp()
    opt = make(model, "probe")
    train(opt, model, 1)
    assert "BackMatching(" in layerlr.describe(opt) and "estimator='probe'" in layerlr.describe(opt)
    stats = opt.layer_stats()
    assert torch.equal(stats["scale"], rates(opt, model))
    torch.testing.assert_close(stats["lr"], 0.05 * rates(opt, model), rtol=1e-15, atol=0)


LIGHT = """
import sys, torch
before = set(sys.modules)
import layerlr
new = {m.partition(".")[0] for m in set(sys.modules) - before} - {"layerlr"}
assert not new, new
assert "torch._dynamo" not in sys.modules
"""


def test_importing_stays_light():
    """Nothing that torch itself did not import already."""
    subprocess.run([sys.executable, "-c", LIGHT], check=True, timeout=60)
