"""Wrapped optimizers: param groups that come later, checkpoints, copies, state on its travels."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import copies, random, same_bits, set_grads, state_of, train
from torch import nn
from torch.nn import Parameter
from wrapped import RULES, SHAPES, params_of, wrapped

import layerlr

# -- groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["layca", "lars"])
def test_a_group_that_is_added(rule):
    params = params_of()
    opt = wrapped("adamw", rule, params)
    train(opt, params, 1)
    (late,) = params_of(seed=5, shapes=((4, 6),))
    opt.add_param_group({"params": [late], "lr": 0.02, "weight_decay": 0.5, "split": 2})
    ours, theirs = opt.param_groups[-1], opt.base.param_groups[-1]
    assert ours["lr"] == 0.02 and ours["split"] == 2 and ours["weight_decay"] == 0.0
    assert theirs["weight_decay"] == 0.5 and "split" not in theirs
    assert theirs["lr"] == (0.01 if rule == "layca" else 0.02)
    before = late.detach().clone()
    train(opt, [*params, late], 1)
    assert not torch.equal(late, before)


def late_groups():
    (late,) = params_of(seed=5, shapes=((4, 6),))
    yield {"params": [late], "split": 3}, "split=3"
    yield {"params": [late], "rule": "curvature"}, "finds its rates"
    yield {"params": [late], "lr": 0.0}, "nonzero lr"
    yield {"params": [late], "lr": -1.0}, "Invalid learning rate"
    yield {"params": [late], "layers": "module"}, "needs parameter names"


LATE = list(late_groups())


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(("group", "message"), LATE, ids=[m for _, m in LATE])
def test_a_group_that_is_refused_leaves_nothing_behind(group, message, ours):
    params = params_of()
    base = (layerlr.AdamW if ours else torch.optim.AdamW)(params, lr=0.01)
    opt = layerlr.wrap(base, "layca", lr=0.05)
    (late,) = group["params"]
    with pytest.raises(ValueError, match=message):
        opt.add_param_group(group)
    for of in (opt, base):
        assert len(of.param_groups) == 1 and late not in of.state
    train(opt, params, 2)


# -- checkpoints and copies ------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["sgd", "adamw", "adafactor"])
@pytest.mark.parametrize("rule", ["layca", "rated", "lars"])
def test_resumes_to_the_bit(base, rule):
    params = params_of()
    opt = wrapped(base, rule, params)
    train(opt, params, 3)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    others = [Parameter(v) for v in copies(params)]
    other = wrapped(base, rule, others, **({} if rule != "layca" else {"adapt": "kernels"}))
    for state in other.state.values():
        if "rate" in state:
            state["rate"].fill_(9.0)  # of no run
    other.load_state_dict(torch.load(file, weights_only=True))
    train(opt, params, 3, seed=3)
    train(other, others, 3, seed=3)
    assert same_bits(params, others)
    for p, q in zip(params, others, strict=True):
        assert state_of(opt.base, p).keys() == state_of(other.base, q).keys()


def test_state_dicts_of_others_are_refused():
    params = params_of()
    opt = wrapped("adamw", "layca", params)
    train(opt, params, 1)
    before = state_of(opt.base, params[0])
    with pytest.raises(ValueError, match=r"optimizer\.base\.load_state_dict"):
        opt.load_state_dict(opt.base.state_dict())
    bad = opt.state_dict()
    bad["param_groups"][0]["rule"] = {"name": "nonsense"}
    bad["state"][0]["base.exp_avg"] = torch.full((7, 5), 9.0)
    with pytest.raises(ValueError, match="unknown rule"):
        opt.load_state_dict(bad)
    now = state_of(opt.base, params[0])
    assert same_bits(before.values(), now.values())
    train(opt, params, 1)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("rule", ["layca", "singh"])
def test_copies_go_on_alike(rule, how):
    model = nn.Linear(6, 5)
    row = RULES[rule]
    opt = layerlr.wrap(torch.optim.Adam(model.parameters(), lr=0.01), row.rule, lr=row.lr)
    train(opt, list(model.parameters()), 2)
    pair = {"model": model, "opt": opt}
    other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert other["opt"].base is not opt.base
    for m, o in ((model, opt), (other["model"], other["opt"])):
        assert o.base.param_groups[0]["params"][0] is m.weight
        train(o, list(m.parameters()), 3)
    assert same_bits(model.parameters(), other["model"].parameters())
    other["opt"].add_param_group({"params": params_of(shapes=((3, 3),))})


def walk(opt, move) -> None:
    """As OpenRLHF, verl and trl's forks offload an optimizer: every tensor of its state."""
    for group in opt.param_groups:
        for p in group["params"]:
            for key, value in opt.state[p].items():
                if isinstance(value, torch.Tensor):
                    opt.state[p][key] = move(value)


@pytest.mark.parametrize("kind", ["built-in", "sgd", "adamw"])
def test_state_may_go_away_and_come_back(kind, engine):
    """Every tensor of the state, ``step`` included, in other memory: same bits."""
    found = []
    for walks in (True, False):
        params = engine.params(random(SHAPES, torch.float32))
        if kind == "built-in":
            opt = layerlr.AdamW(params, lr=0.05, rule="layca", backend=engine.backend)
        else:
            opt = wrapped(kind, "layca", params, engine.backend)
        for step in range(3):
            set_grads(params, step)
            opt.step()
            if walks:
                for of in {opt, getattr(opt, "base", opt)}:
                    walk(of, lambda x: x.to("cpu", torch.float64).clone().to(x.device, x.dtype))
        states = (s for of in (opt, getattr(opt, "base", opt)) for s in of.state.values())
        # the state too: a plan that had not noticed would go on in the old memory
        found.append([*params, *(x for s in states for x in s.values())])
    assert len(found[0]) > 10 and same_bits(*found)
