"""Back-matching through the optimizer: setting the rule, state, training."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from back_matching_nets import ESTIMATORS, backward, batch, factors, make, mlp, rates, train, unit
from cases import copies, same_bits, same_state, state_of
from torch import nn

import layerlr
from layerlr.estimators.back_matching import probe as probing
from layerlr.rules import BackMatching, Curvature, Rated

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
