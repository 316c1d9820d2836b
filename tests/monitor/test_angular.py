"""`monitor.AngularRates`: angles and relative steps of any optimizer, beside float64 ones."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.distributed as dist
from cases import copies, random, same_bits, set_grads
from ranks import fsdp, models, run
from ranks import train as train_model
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import Parameter
from wrapped import base_param, make_base, params_of, values, wrapped

import layerlr
from layerlr.monitor import AngularRates, Telemetry, Trace


def between(v, w):
    """Angle and relative step between two tensors, by the chord of unit vectors."""
    v, w = v.detach().double().cpu(), w.detach().double().cpu()
    chord = (v / v.norm() - w / w.norm()).norm()
    return 2 * math.asin(min(float(chord) / 2, 1.0)), float((w - v).norm() / v.norm())


def check(rates, before, params, rel, adapt=lambda p: p.dim() >= 2):
    found = rates.rates()
    watched = [between(v, p) for v, p in zip(before, params, strict=True) if adapt(p)]
    angles, relative = zip(*watched, strict=True)
    assert found["angle"].tolist() == pytest.approx(angles, rel=rel)
    assert found["relative"].tolist() == pytest.approx(relative, rel=rel)


@pytest.mark.parametrize(
    "base", [base_param(n) for n in ("sgd", "adamw", "adafactor", "muon", "soap", "lion")]
)
def test_any_optimizer(base):
    params = [Parameter(v) for v in values(base)]
    opt = make_base(base, params)
    rates = AngularRates(opt)
    for step in range(4):
        set_grads(params, step)
        grads, before = [p.grad for p in params], copies(params)
        opt.step()
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
        check(rates, before, params, 1e-9)
        assert rates.rates()["step"] == step + 1


@pytest.mark.parametrize("wrap", [False, True], ids=["own", "wrapped"])
@pytest.mark.parametrize("layers", ["tensor", lambda name, p: "one" if p.shape[0] == 7 else name])
def test_layers_that_a_step_leaves_out_turn_by_nothing(engine, layers, wrap):
    """Without a gradient, skipped, under an overflow: not by the angle of an earlier step."""
    params = engine.params(random(((7, 5), (3, 4), (7, 2))))
    kinds = {"rule": "layca", "layers": layers, "backend": engine.backend}
    if wrap:
        opt = layerlr.wrap(torch.optim.SGD(params, lr=0.1), lr=0.1, **kinds)
    else:
        opt = layerlr.SGD(params, lr=0.1, **kinds)
    rates = AngularRates(opt)
    together = layers != "tensor"

    def turned(*without, spoil=None):
        set_grads(params, 0)
        for i in without:
            params[i].grad = None
        if spoil is not None:
            params[spoil].grad[0, 0] = torch.nan
        opt.step()
        found = rates.rates()
        assert all((x > 0) == (y > 0) for x, y in zip(found["angle"], found["relative"]))
        return [bool(x) for x in found["angle"] > 0]

    assert all(turned())
    first = [True, False] if together else [True, False, True]
    assert turned(1) == first
    assert turned(0) == ([True, True] if together else [False, True, True])
    assert turned(0, 2) == ([False, True] if together else [False, True, False])
    if not wrap:
        assert turned(spoil=1) == first
        opt.found_inf = opt.grad_scale = torch.tensor(1.0, device=params[0].device)
        assert not any(turned())


def test_a_layer_whose_tensors_take_turns():
    """The tensor that has taken fewer steps moves the layer alone."""
    model = nn.Linear(3, 3)
    opt = layerlr.SGD(
        model.named_parameters(), lr=0.1, rule="lars", layers=lambda name, p: "one", adapt="all"
    )
    rates = AngularRates(opt)
    for weight, bias in ((True, False), (True, False), (False, True)):
        model.weight.grad = torch.ones(3, 3) if weight else None
        model.bias.grad = torch.ones(3) if bias else None
        opt.step()
        assert rates.rates()["relative"].item() > 0


def test_layers_that_step_inside_backward_are_no_zeros():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    opt = layerlr.SGD(model.named_parameters(), lr=0.1, rule="layca")
    layerlr.step_in_backward(model, opt)
    rates = AngularRates(opt)
    model(torch.ones(2, 4)).square().sum().backward()
    opt.step()
    turned = dict(zip(rates.rates()["names"], rates.rates()["angle"].tolist(), strict=True))
    assert turned["0.weight"] == pytest.approx(math.atan(0.1))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"adapt": "kernel"}, ValueError, "Invalid adapt: 'kernel'"),
        ({"layers": "modul"}, ValueError, "Invalid layers: 'modul'"),
        ({"layers": "module"}, ValueError, "layers='module' needs parameter names"),
        ({"backend": "fast"}, ValueError, "unknown backend 'fast'"),
        ({"model": 3}, TypeError, "AngularRates wants a torch.nn.Module, got int"),
    ],
)
def test_arguments_that_are_refused(options, error, words):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=words):
        AngularRates(opt, **options)
    assert not opt._optimizer_step_pre_hooks
    AngularRates(opt, layers="module", model=model)


@pytest.mark.asked(triton=None)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_engine(engine, dtype):
    params = engine.params(random(((7, 5), (33,), (2, 3, 2, 2)), dtype))
    opt = torch.optim.SGD(params, lr=0.1)
    rates = AngularRates(opt, adapt="all", backend=engine.backend)
    for step in range(2):
        set_grads(params, step)
        before = copies(params)
        opt.step()
        check(rates, before, params, 1e-6, lambda p: True)


OURS = {
    "layca": (layerlr.Adam, "layca"),
    "brake": (layerlr.SGD, "brake"),
    "lamb": (layerlr.AdamW, "lamb"),
    "singh": (layerlr.RMSprop, "singh"),
    "none": (layerlr.AdamW, None),
}


@pytest.mark.parametrize("kind", [*OURS, "wrapped layca", "wrapped lars"])
def test_optimizers_of_this_package(kind):
    """What they know is read; what they do not know is measured."""
    params = params_of(torch.float64, shapes=((7, 5), (6, 4)))
    if kind in OURS:
        cls, rule = OURS[kind]
        opt = cls(params, lr=0.02, weight_decay=0.1, rule=rule)
    else:
        opt = wrapped("adamw", kind.removeprefix("wrapped "), params)
    rates, copied = AngularRates(opt), []
    begin = rates._steps.begin
    rates._steps.begin = lambda: (copied.append(1), begin())
    for step in range(3):
        set_grads(params, step)
        before = copies(params)
        opt.step()
        check(rates, before, params, 1e-9)
    assert len(copied) == (3 if kind in ("none", "wrapped lars") else 0)


def test_changes_nothing_and_measures_seldom():
    found = []
    for watched in (True, False):
        params = params_of()
        opt = torch.optim.AdamW(params, lr=0.01)
        rates = AngularRates(opt, every=3) if watched else None
        for step in range(7):
            set_grads(params, step)
            before = copies(params)
            opt.step()
            if watched and step == 5:
                check(rates, before, params, 1e-5)
        found.append([*params, *(x for s in opt.state.values() for x in s.values())])
        if watched:
            assert rates.rates()["step"] == 6 and rates.step == 7
    assert same_bits(*found)


def test_a_refused_monitor_leaves_no_file(tmp_path):
    opt, path = torch.optim.SGD([torch.ones(2, 2, requires_grad=True)]), tmp_path / "d" / "a.jsonl"
    with pytest.raises(TypeError):
        AngularRates(opt, path, 5)
    with pytest.raises(TypeError):
        AngularRates(opt, path, model="x")
    assert not path.parent.exists()


def test_closures_late_groups_and_frozen_parameters():
    a, b, c = params_of(torch.float64, shapes=((7, 5), (6, 4), (3, 3)))
    b.requires_grad_(False)
    opt = torch.optim.SGD([a, b], lr=0.1)
    rates = AngularRates(opt)
    assert rates.rates()["names"] == [] and len(rates.rates()["angle"]) == 0
    c_loss = [False]

    def closure():
        opt.zero_grad()
        loss = a.sin().sum() + (b.sin().sum() if b.requires_grad else 0.0)
        loss = loss + (c.sin().sum() if c_loss[0] else 0.0)
        loss.backward()
        return loss

    before = copies([a])
    opt.step(closure)
    check(rates, before, [a], 1e-9)
    b.requires_grad_(True)
    opt.add_param_group({"params": [c]})
    before = copies([a, b, c])
    opt.step(closure)
    assert rates.rates()["names"] == ["group0.param0", "group0.param1", "group1.param0"]
    assert rates.rates()["angle"][2] == 0.0  # it had no gradient
    c_loss[0] = True
    before = copies([a, b, c])
    opt.step(closure)
    check(rates, before, [a, b, c], 1e-9)


def test_layers_of_norm_zero_have_no_angle():
    p = Parameter(torch.zeros(3, 3))
    opt = torch.optim.SGD([p], lr=0.1)
    rates = AngularRates(opt)
    p.grad = torch.ones_like(p)
    opt.step()
    found = rates.rates()
    assert found["angle"].tolist() == found["relative"].tolist() == [0.0]


def test_names_and_layers():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    named = torch.optim.SGD(model.named_parameters(), lr=0.1)
    all_rates = [
        AngularRates(opt, model=model),
        AngularRates(named, layers="module", adapt="all"),
        AngularRates(layerlr.SGD(model.parameters(), lr=0.1, rule="layca", adapt="kernels")),
    ]
    late = AngularRates(opt)
    late.attach(model)
    all_rates[2].optimizer.attach(model)
    for rates in all_rates:
        set_grads(list(model.parameters()), 0)
        rates.optimizer.step()
    assert all_rates[0].rates()["names"] == late.rates()["names"] == ["0.weight", "1.weight"]
    assert all_rates[1].rates()["names"] == ["0", "1"]
    assert all_rates[2].rates()["names"][:2] == ["0.weight", "0.bias"]
    assert "param_names" not in opt.param_groups[0]


def test_sinks_and_closing(tmp_path):
    params, seen, trace = params_of(), [], Trace()
    opt = torch.optim.SGD(params, lr=0.1)
    path = tmp_path / "run" / "angles.jsonl"
    with AngularRates(opt, path, trace, lambda step, t: seen.append((step, t)), every=2) as rates:
        for step in range(5):
            set_grads(params, step)
            opt.step()
        state = rates.state_dict()
    set_grads(params, 9)
    opt.step()
    assert rates.step == 5 and state == {"step": 5}
    assert [step for step, _ in seen] == trace.steps == [2, 4]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[-1]["step"] == 4 and rows[-1]["layer"] == "group0.param2"
    assert rows[-1]["relative"] == seen[-1][1]["relative"][-1].item()
    loaded = Trace.load(path)
    assert loaded.steps == trace.steps and loaded.angles == trace.angles
    rates.close()


def test_refusals(tmp_path):
    opt = torch.optim.SGD(params_of(), lr=0.1)
    with pytest.raises(TypeError, match="got Linear"):
        AngularRates(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Invalid every"):
        AngularRates(opt, every=0)
    with pytest.raises(ValueError, match="jsonl"):
        AngularRates(opt, "angles.csv")
    with pytest.raises(TypeError, match="with layer_stats"):
        Telemetry(opt)


def _sharded():
    whole, model = models()
    fsdp(model)
    for make in (
        lambda m: torch.optim.AdamW(m.named_parameters(), lr=0.01),
        lambda m: layerlr.SGD(m.named_parameters(), lr=0.01, rule="singh"),
    ):
        opt, whole_opt = make(model), make(whole)
        rates, wanted = AngularRates(opt), AngularRates(whole_opt)
        train_model(whole, whole_opt, 3)
        train_model(model, opt, 3, dist.get_rank())
        names = rates.rates()["names"]
        assert names == [n for n in wanted.rates()["names"] if n in names] and "up.weight" in names
        of = [wanted.rates()["names"].index(n) for n in names]
        for key in ("angle", "relative"):
            torch.testing.assert_close(
                rates.rates()[key], wanted.rates()[key][of], rtol=1e-8, atol=1e-12
            )
        with CommDebugMode() as alone:
            opt.step()
        rates.close()
        with CommDebugMode() as unwatched:
            opt.step()
        assert alone.get_total_counts() - unwatched.get_total_counts() == 1
        wanted.close()
        with torch.no_grad():
            for p, q in zip(model.parameters(), whole.parameters(), strict=True):
                p.copy_(torch.distributed.tensor.distribute_tensor(q, p.device_mesh, p.placements))


@pytest.mark.full("FSDP")
def test_one_message_under_sharding():
    run(2, _sharded)
