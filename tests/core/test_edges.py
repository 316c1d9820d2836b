"""The edge rules: what must not change keeps its bits, the signs of zeros included."""

from __future__ import annotations

import copy
import math
import multiprocessing
import pickle

import cases
import pytest
import torch
from cases import CASES, SHORT, copies, ids, random, same_bits, set_grads, state_of
from contract_helpers import photograph, same
from ranks import PATIENCE
from selection import EDGES, NONE
from spec import Spec

import layerlr
from layerlr.rules import Lars, Layca

#: float32, float64, bfloat16, float16, each a kernel and a vector, and a number
DTYPES = (*cases.DTYPES, *cases.DTYPES, torch.float32)
SHAPES = ((6, 5), (4, 3), (5, 4), (2, 3, 2), (7,), (3,), (9,), (2,), ())
every = pytest.mark.parametrize("case", CASES, ids=ids(CASES))
directions = pytest.mark.parametrize("name", cases.DIRECTION_ROWS)


def model(engine, fill=None):
    """A parameter of each kind; the first elements are the awkward ones."""
    out = []
    for v, dtype in zip(random(SHAPES, seed=3), DTYPES):
        v = v.to(dtype) if fill is None else torch.full_like(v, fill, dtype=dtype)
        if fill is None and v.numel() > 3:
            tiny = torch.finfo(dtype).smallest_normal / 2  # a subnormal
            v.view(-1)[:4] = torch.tensor([-0.0, 0.0, tiny, -tiny], dtype=torch.float64)
        out += engine.params([v])
    return out


def zero_grads(params):
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, -0.0 if i % 2 else 0.0)


def row(direction, rule):
    return cases.BY_ID[f"{direction}-{rule}"]


# -- zeros -----------------------------------------------------------------------------------------


@every
def test_zero_gradient_is_no_step(engine, case):
    params = model(engine)
    opt = engine.make(case, params, weight_decay=0.0)
    before = copies(params)
    for _ in range(2):
        zero_grads(params)
        opt.step()
    assert same_bits(params, before)
    for p in params:
        if "radius" in opt.state[p]:  # nothing has rotated yet
            assert (opt.state[p]["radius"] == 0).all()
    if case.rule is not None and case.rule.name == "singh":
        assert (opt.layer_stats()["scale"] == 0).all()  # and not infinite


@directions
def test_singh_zero_gradient_after_others(engine, name):
    # what the buffers hold goes on moving the weights; the factor of zero adds nothing
    case = row(name, "singh")
    params = engine.params(random(((4, 3), (5,)), seed=3))
    opt = engine.make(case, params)
    spec = Spec(case.kind, opt.param_groups[0], params)
    for step in range(4):
        set_grads(params, step)
        if step == 2:
            zero_grads(params)
        spec.follow(opt, params)
        spec.step([p.grad for p in params])
        opt.step()
        spec.check(params, opt)


@pytest.mark.parametrize("rule", ["lamb", "layca"])
@pytest.mark.parametrize("lr", [0.01, 0.13, 0.3])
def test_update_that_decay_cancels(engine, wide, rule, lr):
    # betas and eps of 0: u = g/|g|, and 8*w takes it away; (1 - 8*lr)*w - lr*u would show rounding
    w = torch.tensor([[0.125, -0.125, 0.125]], dtype=wide)
    (p,) = engine.params([w])
    kwargs = {"betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 8.0}
    opt = layerlr.AdamW([p], lr=lr, rule=rule, adapt="all", backend=engine.backend, **kwargs)
    p.grad = torch.tensor([[-3.0, 0.5, -1.0]], dtype=wide).to(p)
    opt.step()
    assert opt.layer_stats()["uu"].item() == opt.layer_stats()["skipped"].item() == 0
    assert same_bits([p], [w])


RATES = [(case, "number") for case in CASES]
RATES += [(case, kind) for case in SHORT for kind in ("tensor", "lr_factor")]


@pytest.mark.parametrize(("case", "rate"), RATES, ids=[f"{c.id}-{kind}" for c, kind in RATES])
def test_zero_rate_changes_no_weight(engine, case, rate):
    """Checkpoint libraries run such a step when they resume."""
    params = model(engine)
    opt = engine.make(case, params)
    group = opt.param_groups[0]
    for trained in (False, True):
        if trained:
            cases.train(opt, params, 1)
            with torch.no_grad():
                for p in params:  # away from the stored radius
                    p.mul_(1.25)
        before = copies(params)
        radii = [opt.state.get(p, {}).get("radius", torch.ones(1) * trained) for p in params]
        radii = copies(radii)
        if rate == "lr_factor":
            group["lr_factor"] = 0.0
        else:
            group["lr"] = 0.0 if rate == "number" else torch.tensor(0.0)
        set_grads(params, 7)
        opt.step()
        group["lr"], group["lr_factor"] = case.args["lr"], 1.0
        assert same_bits(params, before)
        for p, radius in zip(params, radii):
            assert torch.equal(opt.state.get(p, {}).get("radius", radius), radius)
            assert bool((radius > 0).any()) == trained


@pytest.mark.parametrize("trust", [0.0, 1e-3])
def test_lars_clip_at_zero_rate(engine, trust):
    # min(f/lr, 1) is 0/0 for both zero: still a number, and no weight moves
    params = model(engine)
    rule, before = Lars(trust=trust, trust_clip=True), copies(params)
    opt = layerlr.SGD(params, lr=0.0, momentum=0.9, rule=rule, backend=engine.backend)
    cases.train(opt, params, 1)
    assert same_bits(params, before)
    assert all(torch.isfinite(s["momentum_buffer"]).all() for s in opt.state.values())


@directions
@pytest.mark.parametrize("rule", ["lars", "lamb", "layca"])
def test_zero_weights_take_the_plain_step(engine, name, rule):
    params, plain = model(engine, 0.0), model(engine, 0.0)
    opt, twin = engine.make(row(name, rule), params), engine.make(row(name, "none"), plain)
    assert all("radius" not in s or (s["radius"] == 0).all() for s in opt.state.values())
    for p in (params, plain):
        set_grads(p, 1)
    opt.step()
    twin.step()
    assert same_bits(params, plain)
    scale = dict(zip(opt.layer_stats()["names"], opt.layer_stats()["scale"].tolist()))
    assert set(scale.values()) == {1.0}
    if rule != "layca":
        return
    for p in params:  # they grow, see test_start_radius.py
        if p.dim() >= 2 and p.numel():
            assert opt.state[p]["radius"].item() < 0


@directions
def test_lars_zero_gradient_takes_the_plain_step(engine, name):
    params, plain = model(engine), model(engine)
    zero_grads(params)
    zero_grads(plain)
    engine.make(row(name, "lars"), params).step()
    engine.make(row(name, "none"), plain).step()
    assert same_bits(params, plain)


# -- layca: nothing orthogonal left ----------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, -1.0, 4.0, 2.0**-6])
@pytest.mark.parametrize("rule", [Layca(), Layca(radius="current")], ids=["initial", "current"])
def test_parallel_update_keeps_bits(engine, factor, rule):
    params = model(engine)
    opt = layerlr.SGD(params, lr=0.1, rule=rule, adapt="all", backend=engine.backend)
    before = copies(params)
    for p in params:
        p.grad = (p.detach() * factor).clone()
    opt.step()
    assert same_bits(params, before)
    stats = opt.layer_stats()
    assert (stats["scale"] == 0).all() and (stats["angle"] == 0).all()
    assert all(opt.state[p]["step"] == 1 for p in params)
    assert all(s.get("radius", torch.zeros(1)).item() == 0 for s in opt.state.values())


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
@pytest.mark.parametrize("side", [0.5, 2.0])
def test_parallel_is_relative_to_the_step(engine, eps, side):
    # u = 1000*(w + perp), |perp| = side*eps*|w|: below eps it stays, above it rotates by atan(lr)
    w = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    (p,) = engine.params([w])
    opt = layerlr.SGD([p], lr=0.1, rule=Layca(eps=eps), adapt="all", backend=engine.backend)
    p.grad = 1000 * (w + side * eps * torch.tensor([[-4.0, 3.0]])).to(p)
    opt.step()
    if side < 1:
        assert same_bits([p], [w])
    else:
        moved = p.detach().cpu()
        turned = math.atan2(
            (w[0, 0] * moved[0, 1] - w[0, 1] * moved[0, 0]).item(), (w * moved).sum().item()
        )
        # perp^2 = uu - wu^2/ww loses eps^-2 of float64's digits
        assert turned == pytest.approx(-math.atan(0.1), rel=8 * 2.0**-52 / eps**2)


# -- very small and very large ---------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("rule", cases.RULE_ROWS)
def test_extreme_but_finite(engine, scale, rule):
    # squares beyond float32's range; weights of the same size, so that nothing is rounded away
    case = row("mom", rule)
    if rule == "lars":
        case = case._replace(rule=Lars(trust=0.3, eps=0.0))
    params = engine.params(random(((4, 3), (5,)), seed=3, scale=scale), torch.float32)
    opt = engine.make(case, params)
    spec = Spec(case.kind, opt.param_groups[0], params)
    for seed in range(2):
        set_grads(params, seed, scale)
        spec.follow(opt, params)
        spec.step([p.grad for p in params])
        opt.step()
        spec.check(params, opt)
    assert opt.layer_stats()["skipped"].sum() == 0


# -- gradients are read only -----------------------------------------------------------------------


@pytest.mark.asked(simt=EDGES)
@every
def test_gradients_are_never_written(engine, case):
    params = model(engine)
    opt = engine.make(case, params)
    for seed in range(2):
        set_grads(params, seed)
        if seed:
            params[0].grad.view(-1)[0] = float("nan")
            params[4].grad.zero_()
        objects, values = [p.grad for p in params], copies([p.grad for p in params])
        versions = [g._version for g in objects]
        opt.step()
        assert all(p.grad is g for p, g in zip(params, objects))
        assert same_bits(objects, values)
        assert [g._version for g in objects] == versions


# -- copies and late comers ------------------------------------------------------------------------


@pytest.mark.asked(triton=NONE)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_alike(engine, how):
    for case in SHORT:
        params = model(engine)
        opt = engine.make(case, params)
        cases.train(opt, params, 2)
        clone = copy.deepcopy(opt) if how == "deepcopy" else pickle.loads(pickle.dumps(opt))
        twins = clone.param_groups[0]["params"]
        cases.train(opt, params, 2, seed=5)
        assert not torch.equal(params[0], twins[0])
        cases.train(clone, twins, 2, seed=5)
        assert same_bits(params, twins), case.id
        assert same(photograph(opt)["state"], photograph(clone)["state"])


def _step_in_child(opt, params, pipe):
    torch.set_num_threads(1)  # the parent's threads are not here
    cases.train(opt, params, 2, seed=5)
    pipe.send([p.detach().double().numpy() for p in params])


@pytest.mark.asked(triton=NONE, simt=NONE)
def test_fork_goes_on_alike(engine):
    if engine.device != "cpu":
        pytest.skip(reason="CUDA cannot be used in a forked process")
    params = model(engine)
    opt = engine.make(row("adamw", "layca"), params)
    cases.train(opt, params, 2)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_step_in_child, args=(opt, params, there))
    child.start()
    answer = here.recv() if here.poll(PATIENCE) else None
    child.join(PATIENCE)
    cases.train(opt, params, 2, seed=5)
    assert answer is not None and child.exitcode == 0
    assert same_bits([torch.from_numpy(a) for a in answer], [p.double() for p in params])


@pytest.mark.parametrize("case", SHORT, ids=ids(SHORT))
def test_late_gradients_and_late_parameters(engine, case):
    """Each parameter steps as if it were alone, whenever its gradients come."""
    values = random(((4, 3), (3, 5), (6,)), seed=3)
    ours, alone = engine.params(values), engine.params(values)
    opt = engine.make(case, [{"params": ours[:2]}, {"params": []}], rate=1.0)  # as of those later
    singles = [engine.make(case, [p], rate=1.0) for p in alone]
    for step in range(4):
        if step == 2:
            opt.add_param_group({"params": ours[2:]})
        for p, q, g in zip(ours, alone, random([v.shape for v in values], seed=step)):
            late = (q is alone[1] and step < 1) or (q is alone[2] and step < 3)
            p.grad = q.grad = None if late else g.to(p)
        opt.step()
        for single in singles:
            single.step()
    assert same_bits(ours, alone)
    frozen = getattr(case.rule, "others", "") == "freeze"  # the vector
    assert [int(state_of(opt, p).get("step", 0)) for p in ours] == [4, 3, 0 if frozen else 1]
