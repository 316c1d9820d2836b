"""Layers that start at zero under rules with a radius: plain steps, the sphere from there."""

from __future__ import annotations

import json
import math
from itertools import product
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from cases import Engine, same_bits, set_grads
from ranks import everywhere_the_same, full, run
from selection import NONE
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import layerlr
from layerlr import rules
from layerlr.monitor import Telemetry

RULES = [rules.Layca(), rules.Layca(radius="current"), rules.Hyperball()]
RULES += [rules.Hyperball(radius="current")]
both = pytest.mark.parametrize("rule", RULES, ids=["layca", "layca-now", "hyperball", "ball-now"])


def steps(engine, rule, count, **kwargs):
    """Norms of a layer that starts at zero and is pushed one way, and its optimizer."""
    (p,) = engine.params([torch.zeros(12, 5)])
    kwargs = {"lr": 0.2, **kwargs}
    opt = layerlr.SGD([p], rule=rule, backend=engine.backend, **kwargs)
    norms = []
    for _ in range(count):
        p.grad = -torch.ones_like(p)
        opt.step()
        norms.append(p.detach().double().norm().item())
    return norms, opt, p


@both
def test_grows_by_plain_steps_to_the_radius(engine, rule):
    start = math.sqrt(12 / 3)  # of torch's initialisation: 12 rows
    norms, opt, p = steps(engine, rule, 4)
    plain = [0.2 * k * math.sqrt(60) for k in (1, 2)]  # 1.55, 3.10: past the radius of 2
    assert norms[:2] == pytest.approx(plain, rel=1e-6)
    # the third step finds it there; pushed along itself it stays on its ray
    wanted = norms[1] if rule.radius == "current" else start
    if rule.name == "layca":  # nothing orthogonal is left: the bits stay
        wanted = norms[1]
    assert norms[2:] == pytest.approx([wanted, wanted], rel=1e-6)
    assert opt.state[p]["radius"].item() == pytest.approx(start, rel=1e-14)


@both
def test_a_part_at_zero_takes_the_plain_step(engine, rule):
    """Where a tensor of the layer has no gradient its norm is none of the layer's."""
    p, q = engine.params([torch.zeros(12, 5), torch.zeros(5)])
    named = [("block.weight", p), ("block.bias", q)]
    kwargs = {"layers": "module", "adapt": "all", "backend": engine.backend}
    opt = layerlr.SGD(named, lr=0.2, rule=rule, **kwargs)
    p.grad = -torch.ones_like(p)
    opt.step()
    assert p.detach().double().norm().item() == pytest.approx(0.2 * math.sqrt(60), rel=1e-6)
    assert not q.any() and not opt.state[p]["radius"].any()


@both
def test_grows_at_the_plain_rate(engine, rule):
    norms, opt, _ = steps(engine, rule, 1, lr=0.01, plain_lr=0.2)
    assert norms == pytest.approx([0.2 * math.sqrt(60)], rel=1e-6)
    assert opt.layer_stats()["lr"].item() == pytest.approx(0.2)


@both
def test_waits_at_a_rate_of_zero(engine, rule):
    norms, opt, p = steps(engine, rule, 2, lr=0.0)
    assert norms == [0.0, 0.0] and opt.state[p]["radius"].item() == 0.0
    opt.param_groups[0]["lr"] = 0.2
    p.grad = torch.zeros_like(p)  # a step of nothing leaves no trace either
    opt.step()
    assert opt.state[p]["radius"].item() == 0.0
    p.grad = -torch.ones_like(p)
    opt.step()
    assert opt.state[p]["radius"].item() == -2.0


@both
def test_the_option_fixes_the_radius(engine, rule):
    rule = type(rule)(radius=rule.radius, start_radius=1.0)
    _, opt, p = steps(engine, rule, 1)
    assert opt.state[p]["radius"].item() == -1.0
    set_grads([p], 3)
    opt.step()
    assert opt.state[p]["radius"].item() == 1.0
    if rule.radius == "initial":
        assert p.detach().double().norm().item() == pytest.approx(1.0, rel=1e-6)


def test_resumes_while_it_grows(engine):
    _, opt, p = steps(engine, rules.Layca(), 1)
    (q,) = engine.params([p.detach().cpu()])
    other = layerlr.SGD([q], lr=0.2, rule="layca", backend=engine.backend)
    other.load_state_dict(opt.state_dict())
    for seed in range(4):
        set_grads([p], seed)
        set_grads([q], seed)
        opt.step()
        other.step()
        assert same_bits([p], [q])


def test_a_number_puts_it_on_the_sphere_at_once(engine):
    norms, opt, p = steps(engine, rules.Hyperball(radius=3.0), 2)
    assert norms == pytest.approx([3.0, 3.0], rel=1e-6)
    assert "radius" not in opt.state[p]


def test_rows_of_the_part_of_a_split_tensor():
    p = nn.Parameter(torch.zeros(12, 5))
    opt = layerlr.SGD([{"params": [p], "split": [9, 3]}], lr=0.1, rule="layca")
    p.grad = torch.ones_like(p)
    opt.step()
    assert opt.state[p]["radius"].tolist() == pytest.approx([-math.sqrt(3), -1.0])


def _sharded():
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(torch.zeros(11, 5))  # 6 rows on one process, 5 on the other
    q = nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)]))
    opt, sharded = layerlr.SGD([p], lr=0.2, rule="layca"), layerlr.SGD([q], lr=0.2, rule="layca")
    told = []
    Telemetry(sharded, lambda _, table: told.append(table.get("grows_to")), every=1)
    for seed in range(5):
        set_grads([p], seed, 2.0)
        q.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
        opt.step()
        sharded.step()
        torch.testing.assert_close(everywhere_the_same(full(q.detach())), p.detach())
        torch.testing.assert_close(sharded.state[q]["radius"], opt.state[p]["radius"])
        if seed == 0:
            assert opt.state[p]["radius"].item() == -math.sqrt(11 / 3)
    assert opt.state[p]["radius"].item() > 0
    assert told[0].tolist() == [math.sqrt(11 / 3)] and told[-1] is None


def test_a_sharded_layer_grows_to_the_radius_of_the_whole():
    run(2, _sharded)


def test_describe_names_layers_that_grow():
    p = nn.Parameter(torch.zeros(12, 5))
    opt = layerlr.SGD([("head", p)], lr=0.1, rule="layca")
    p.grad = torch.ones_like(p)
    opt.step()
    assert "grows from zero by plain steps to norm 2 (head)" in layerlr.describe(opt)
    for seed in range(20):
        set_grads([p], seed)
        opt.step()
    assert "grows" not in layerlr.describe(opt)


@pytest.mark.quick(triton=NONE)
@pytest.mark.parametrize("rule", ["layca", "hyperball"])
def test_telemetry_names_layers_while_they_grow(engine, rule, tmp_path):
    """In a column of the tables, the file and the writer; a split tensor has several layers."""
    halves = torch.cat([torch.ones(4, 5), torch.zeros(12, 5)])
    params = engine.params([halves, torch.ones(3, 4), torch.zeros(2, 2)])
    groups = [
        {"params": [("head", params[0])], "split": [4, 12]},
        {"params": [("body", params[1])]},
        {"params": [("other", params[2])], "rule": "lamb"},
    ]
    opt = layerlr.SGD(groups, lr=0.2, rule=rule, backend=engine.backend)
    tables, scalars, file = [], [], tmp_path / "layers.jsonl"
    writer = SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar))
    with Telemetry(opt, lambda _, table: tables.append(table), file, writer, every=1):
        for _ in range(4):
            for p in params:
                p.grad = -torch.ones_like(p)
            opt.step()
    names = ["head[0]", "head[1]", "body", "other"]
    radii = [0.0, 2.0, 0.0, 0.0]  # of 12 rows: sqrt(12/3)
    assert all(table["names"] == names for table in tables)
    # two steps of 0.2*sqrt(60) reach it, which the third finds
    assert [table["grows_to"].tolist() for table in tables[:2]] == [radii, radii]
    assert [list(table)[-1] for table in tables] == ["grows_to"] * 2 + ["skipped"] * 2
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row.get("grows_to") for row in rows] == radii * 2 + [None] * 8
    assert [scalar for scalar in scalars if "grows_to" in scalar[0]] == [
        (f"layer_grows_to/{name}", radius, step)
        for step in (1, 2)
        for name, radius in zip(names, radii, strict=True)
    ]


# -- what comes of it ------------------------------------------------------------------------------

CPU = Engine("cpu", "cpu")


class Run(NamedTuple):
    """A short training run; the id is what marks know it by."""

    rule: str
    family: str
    warmup: int

    @property
    def id(self) -> str:
        return "-".join(map(str, self))

    def loss(self, engine, start_radius=None, drawn=False):
        """After 120 steps on four classes that are far apart, of a head that starts at zero."""
        torch.manual_seed(0)
        y = torch.arange(32) % 4
        x = (torch.randn(32, 8) + 4 * torch.eye(8)[y]).to(engine.device)
        model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))
        if not drawn:
            nn.init.zeros_(model[2].weight)
        model.to(engine.device)
        rule = rules.resolve({"name": self.rule, "start_radius": start_radius})
        lr = 0.1 if self.family == "SGD" else 0.02
        family = getattr(layerlr, self.family)
        opt = family(model.parameters(), lr=lr, rule=rule, backend=engine.backend)
        for step in range(120):
            opt.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / max(self.warmup, 1))
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y.to(engine.device))
            loss.backward()
            opt.step()
        return loss.item()


RUNS = [Run(*run) for run in product(("layca", "hyperball"), ("SGD", "Adam"), (0, 20, 100))]
#: Triton interpreted takes 5 s and more: each pair of rule, family and warm-up once.
PAIRS = ("layca-SGD-0", "hyperball-Adam-0", "hyperball-SGD-20", "layca-Adam-20")
PAIRS += ("layca-SGD-100", "hyperball-Adam-100")


@pytest.mark.asked(triton=PAIRS)
@pytest.mark.quick(triton=NONE)
@pytest.mark.parametrize("case", RUNS, ids=lambda run: run.id)
def test_a_head_that_starts_at_zero_learns(engine, case):
    """It ends within twice the loss of the head drawn as usual, whatever the warm-up."""
    usual = case.loss(CPU, drawn=True)  # on which all engines agree
    assert usual < 0.15 and case.loss(engine) < 2 * usual


@pytest.mark.parametrize("rule", ["layca", "hyperball"])
def test_a_head_that_is_held_near_zero_does_not(rule):
    """So the bound above can be missed."""
    assert Run(rule, "SGD", 20).loss(CPU, start_radius=0.01) > 1.2


@pytest.mark.parametrize("rule", ["lars", "lamb", "relative", "layca", "hyperball"])
def test_a_layer_of_zeros_takes_the_plain_step_at_the_plain_rate(engine, rule):
    """Nothing can be relative to it, and lr may be a rate that suits ratios alone."""
    zeros, ones = engine.params([torch.zeros(2, 3), torch.ones(2, 3)], torch.float32)
    opt = layerlr.SGD(
        [zeros, ones], lr=8.0, plain_lr=0.1, rule=rule, backend=engine.backend, on_nonfinite="skip"
    )
    for p in (zeros, ones):
        p.grad = torch.full_like(p, 0.5)
    opt.step()
    torch.testing.assert_close(zeros.detach().cpu(), torch.full((2, 3), -0.05))
    assert opt.layer_stats()["lr"].tolist()[0] == pytest.approx(0.1)
    first = zeros.clone()
    zeros.grad = torch.zeros_like(zeros)
    opt.step()
    assert torch.equal(zeros, first)


def test_a_part_of_a_layer_of_zeros_as_well(engine):
    """Of a part no radius is kept."""
    weight, bias = engine.params([torch.zeros(2, 3), torch.ones(2)], torch.float32)
    named = [("m.weight", weight), ("m.bias", bias)]
    options = {"lr": 8.0, "plain_lr": 0.1, "layers": "module", "adapt": "all"}
    opt = layerlr.SGD(named, rule="layca", backend=engine.backend, **options)
    weight.grad = torch.ones_like(weight)
    opt.step()
    torch.testing.assert_close(weight.detach().cpu(), torch.full((2, 3), -0.1))
