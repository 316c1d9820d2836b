"""Which parameters form a layer, and that each layer steps as it should."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch
from cases import BY_ID, SHORT, copies, ids, random, same_bits, set_grads, state_of
from selection import EDGES, NONE
from spec import Spec
from torch.nn import Parameter

import layerlr
from layerlr.rules import Layca, Singh

NAMES = ("body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "norm.weight")
SHAPES = ((4, 3), (4,), (2, 4), (2,), (5,))
#: bfloat16 kernels with float32 biases in one layer
MIXED = (torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.float32)


def net(engine, dtypes=(torch.float64,) * 5):
    values = [v.to(d) for v, d in zip(random(SHAPES, seed=12), dtypes)]
    return engine.params(values)


def by_ending(name, p):
    return name.rpartition(".")[2]


def tail(name, p):
    return "norm" not in name


#: layers, adapt -> the parameters of each layer, the names of all rows
ASSIGNED = {
    "tensor": ("tensor", "all", [[0], [1], [2], [3], [4]], list(NAMES)),
    "module": ("module", "all", [[0, 1], [2, 3], [4]], ["body.0", "body.1", "norm"]),
    "callable": (by_ending, "all", [[0, 2, 4], [1, 3]], ["weight", "bias"]),
    "one key": (lambda name, p: None, "all", [[0, 1, 2, 3, 4]], ["None"]),
    "kernels": ("tensor", "kernels", [[0], [2]], list(NAMES)),
    "none": ("module", "none", [], list(NAMES)),
    "kernels of modules": (
        "module",
        "kernels",
        [[0], [2]],
        ["body.0", "body.0.bias", "body.1", "body.1.bias", "norm.weight"],
    ),
    "adapt callable": ("module", tail, [[0, 1], [2, 3]], ["body.0", "body.1", "norm.weight"]),
    "nothing": ("tensor", lambda name, p: False, [], list(NAMES)),
}
RULES = [rule for rule in cases.RULE_ROWS if rule != "none"]
JOINED = [BY_ID[f"{d}-{rule}"] for d in ("nag", "adamw", "rms-c") for rule in RULES]
#: Rule and assignment meet with one direction in turn, so that every two of the three meet: layers
#: are formed before the step, which sees their numbers alone. Triton's rows meet every assignment.
ASSIGNED_ROWS = [
    pytest.param(case, how, id=f"{how}-{case.id}")
    for i, how in enumerate(ASSIGNED)
    for j, case in enumerate(JOINED)
    if (i + j + j // len(RULES)) % 3 == 0 or case.id in EDGES
]


@pytest.mark.parametrize(("case", "how"), ASSIGNED_ROWS)
def test_layers_and_adapt(engine, case, how):
    layers, adapt, members, names = ASSIGNED[how]
    for dtypes in (MIXED[3:4] * 5, MIXED):
        params = net(engine, dtypes)
        opt = engine.make(case, list(zip(NAMES, params)), layers=layers, adapt=adapt)
        spec = Spec(case.kind, opt.param_groups[0], params, layers=members)
        for seed in range(2):
            set_grads(params, seed)
            spec.follow(opt, params)
            spec.step([p.grad for p in params])
            opt.step()
            spec.check(params, opt)
        assert opt.layer_stats()["names"] == names


@pytest.mark.parametrize("rule", cases.RULE_ROWS)
def test_default_of_adapt(engine, rule):
    params = net(engine)
    opt = layerlr.SGD(params, lr=0.1, rule=cases.RULE_ROWS[rule], backend=engine.backend)
    lines = layerlr.describe(opt).splitlines()[1:]
    roles = ["adapted" if "adapted" in line else "plain" for line in lines]
    all_of_them = ["adapted"] * 5
    kernels = ["adapted", "plain", "adapted", "plain", "plain"]
    wanted = {"none": ["plain"] * 5} | dict.fromkeys(("plain", "singh", "rated"), all_of_them)
    assert roles == wanted.get(rule, kernels)


@pytest.mark.asked(triton=NONE)
def test_kernels_have_two_dimensions_larger_than_1(engine):
    shapes = ((1, 1, 8), (8, 1), (1, 8), (1,), (), (2, 2), (4, 1, 3, 3), (4, 3, 1, 1), (4, 1, 1, 1))
    params = engine.params(random(shapes))
    opt = layerlr.SGD(params, rule="layca", backend=engine.backend)
    lines = layerlr.describe(opt).splitlines()[1:]
    adapted = ["adapted" in line for line in lines]
    assert adapted == [False, False, False, False, False, True, True, True, False]


@pytest.mark.parametrize("rule", ["LARS", "Lars", layerlr.rules.Lars])
def test_a_rule_by_name_in_any_letters_or_by_its_class(rule):
    p, q = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    opt = layerlr.SGD([{"params": p}, {"params": q, "rule": rule}], rule=rule)
    assert [g["rule"] for g in opt.param_groups] == [layerlr.rules.Lars()] * 2


def test_module_of_a_parameter_without_one(engine):
    params = engine.params(random(((3, 2), (3,))))
    named = list(zip(("weight", "bias"), params))
    opt = layerlr.SGD(named, rule="singh", layers="module", backend=engine.backend)
    assert opt.layer_stats()["names"] == ["(root)"]


def test_a_layer_on_two_devices_is_refused():
    here, there = torch.ones(2, 2), torch.ones(2, 2, device="meta")
    params = [("a", Parameter(here)), ("b", Parameter(there))]
    with pytest.raises(ValueError, match=r"'one' has parameters on cpu and on meta \('b'\)"):
        layerlr.SGD(params, rule="singh", layers=lambda name, p: "one")


def test_frozen_others_do_not_move(engine):
    params = net(engine)
    rule = Layca(others="freeze")
    opt = layerlr.SGD(params, lr=0.1, momentum=0.9, rule=rule, backend=engine.backend)
    before = copies(params)
    cases.train(opt, params, 2)
    moved = [not same_bits([p], [b]) for p, b in zip(params, before)]
    assert moved == [True, False, True, False, False]
    assert not any(state_of(opt, params[i]) for i in (1, 3, 4))


# -- rules of groups -------------------------------------------------------------------------------


@pytest.mark.asked(triton=NONE)  # a group is a plan of its own
@pytest.mark.parametrize("cls", cases.CLASSES)
def test_each_group_has_its_rule(engine, cls):
    rules = ["singh", None, Layca(radius="current"), "lamb", "lars"]
    ours, apart = (engine.params(random([(4, 3)] * 5, seed=3)) for _ in range(2))
    groups = [{"params": [p], "rule": rule} for p, rule in zip(ours, rules)]
    opt = cls(groups, lr=0.1, rule="singh", backend=engine.backend)
    singles = [cls([p], lr=0.1, rule=r, backend=engine.backend) for p, r in zip(apart, rules)]
    for seed in range(3):
        set_grads(ours, seed)
        set_grads(apart, seed)
        opt.step()
        for single in singles:
            single.step()
    assert same_bits(ours, apart)
    assert opt.param_groups[0]["rule"] == Singh()


def test_a_rule_set_between_steps(engine):
    ours, bare = (engine.params(random([(4, 3), (3,)], seed=3)) for _ in range(2))
    opt = layerlr.Adam(ours, lr=0.1, rule="layca", backend=engine.backend)
    twin = layerlr.Adam(bare, lr=0.1, backend=engine.backend)
    cases.train(opt, ours, 2)
    cases.train(twin, bare, 2)
    assert not same_bits(ours[:1], bare[:1])
    with torch.no_grad():
        ours[0].copy_(bare[0])
    opt.param_groups[0]["rule"] = None
    cases.train(opt, ours, 2, seed=5)
    cases.train(twin, bare, 2, seed=5)
    assert same_bits(ours, bare)
    opt.param_groups[0]["rule"] = "singh"  # a name is enough
    cases.train(opt, ours, 1)
    cases.train(twin, bare, 1)
    assert not same_bits(ours[:1], bare[:1])


# -- late comers within a layer --------------------------------------------------------------------


@pytest.mark.parametrize("case", JOINED, ids=ids(JOINED))
def test_a_layer_is_what_has_gradients(engine, case):
    """Sums are over the tensors that take part; the radius waits for the whole layer."""
    params = net(engine)[:2]
    named = list(zip(NAMES, params))
    opt = engine.make(case, named, layers="module", adapt="all")
    alone = Spec(case.kind, opt.param_groups[0], params[:1], layers=[[0]])
    alone.follow(opt, params[:1])
    set_grads(params, 0)
    params[1].grad = None
    alone.step([params[0].grad])
    opt.step()
    alone.check(params[:1], opt)
    assert state_of(opt, params[1])["step"] == 0
    both = Spec(case.kind, opt.param_groups[0], params, layers=[[0, 1]])
    for seed in (1, 2):
        both.follow(opt, params)
        set_grads(params, seed)
        both.step([p.grad for p in params])
        opt.step()
        both.check(params, opt)
    # and again without: the radius of the whole is not that of a part
    alone = Spec(case.kind, opt.param_groups[0], params[:1], layers=[[0]])
    alone.follow(opt, params[:1])
    params[1].grad = None
    alone.step([params[0].grad])
    opt.step()
    alone.check(params[:1], opt)


@pytest.mark.parametrize("case", SHORT, ids=ids(SHORT))
def test_frozen_then_thawed_then_frozen(engine, case):
    ours, fresh = (engine.params(random([(4, 3), (3, 4)], seed=3)) for _ in range(2))
    ours[1].requires_grad_(False)
    opt = engine.make(case, ours, rate=1.0)
    for seed in range(2):
        set_grads(ours[:1], seed)
        opt.step()
    assert same_bits(ours[1:], fresh[1:])
    ours[1].requires_grad_(True)
    twin = engine.make(case, fresh[1:], rate=1.0)
    for seed in range(2):
        set_grads(ours, seed)
        fresh[1].grad = ours[1].grad.clone()
        opt.step()
        twin.step()
    assert same_bits(ours[1:], fresh[1:])
    ours[1].requires_grad_(False)
    ours[1].grad = None
    before = copies(ours[1:])
    set_grads(ours[:1], 9)
    opt.step()
    assert same_bits(ours[1:], before)


def _two_models(engine):
    p, q = engine.params([torch.randn(4, 4), 100 * torch.randn(4, 4)])
    for x in (p, q):
        x.grad = torch.randn(4, 4)
    return p, q


@pytest.mark.parametrize("cls", [layerlr.SGD, layerlr.AdamMini])
def test_parameters_of_one_name_are_layers_of_their_own(engine, cls):
    """As those of two models are: GANs, actor and critic."""
    p, q = _two_models(engine)
    alone = p.detach().clone().requires_grad_()
    alone.grad = p.grad.clone()
    rule = {} if cls is layerlr.AdamMini else {"rule": "layca"}
    opt = cls([("weight", p), ("weight", q)], lr=0.1, backend=engine.backend, **rule)
    one = cls([("weight", alone)], lr=0.1, backend=engine.backend, **rule)
    opt.step()
    one.step()
    assert opt.layer_stats()["names"] == ["weight", "weight"]
    assert torch.equal(p, alone)


def test_outsiders_of_one_name_are_skipped_one_by_one(engine):
    p, q = engine.params([torch.ones(4), torch.ones(4)])
    p.grad, q.grad = torch.full((4,), float("nan")), torch.ones(4)
    opt = layerlr.SGD([("bias", p), ("bias", q)], lr=0.1, rule="layca", backend=engine.backend)
    opt.step()
    assert torch.equal(p, torch.ones(4)) and not torch.equal(q, torch.ones(4))


def test_modules_of_one_name_are_refused(engine):
    p, q = _two_models(engine)
    with pytest.raises(ValueError, match=r"'0\.weight' is the name of two parameters of group 0"):
        layerlr.SGD([("0.weight", p), ("0.weight", q)], rule="layca", layers="module")


def test_numbers_of_numpy(engine):
    p = engine.params([torch.ones(4, 4)])[0]
    p.grad = torch.ones(4, 4)
    factor = np.array([1.0])
    opt = layerlr.SGD(
        [{"params": [("w", p)], "split": np.int64(1), "lr_factor": factor}],
        lr=0.1,
        rule="layca",
        backend=engine.backend,
    )
    factor[0] = 0.0  # seen at the next step, as a list's change is
    opt.step()
    assert torch.equal(p, torch.ones(4, 4))
