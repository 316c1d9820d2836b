"""NaN and inf: what is left alone, what goes on, and what is counted."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import (
    CASES,
    RULED,
    SHORT,
    copies,
    ids,
    random,
    same_bits,
    same_state,
    set_grads,
    state_of,
)
from contract_helpers import photograph, same
from selection import EVERY

import layerlr

BAD = (float("nan"), float("inf"), -float("inf"))
SPOILT = 4  # of the parameters: a kernel and a vector in float32, a kernel in bfloat16, a number


def skip_model(engine):
    shapes = ((6, 5), (5,), (4, 3), (), (3, 4), (7,), (2, 5))
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.float32, *cases.DTYPES[:3])
    return [p for v, d in zip(random(shapes, seed=2), dtypes) for p in engine.params([v], d)]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_not_finite_is_skipped(engine, case):
    ours, without = skip_model(engine), skip_model(engine)
    opt, twin = (engine.make(case, p, on_nonfinite="skip") for p in (ours, without))
    cases.train(opt, ours, 2)
    cases.train(twin, without, 2)
    freezes = getattr(case.rule, "others", "") == "freeze"
    for round, value in enumerate(BAD):
        set_grads(ours, 5 + round)
        set_grads(without, 5 + round)
        for p, q in zip(ours[:SPOILT], without):
            p.grad.view(-1)[0] = value
            q.grad = None  # the others go on as if these had had no gradient
        before, states = copies(ours), [state_of(opt, p) for p in ours]
        opt.step()
        twin.step()
        assert same_bits(ours, without)
        assert same_bits(ours[:SPOILT], before[:SPOILT])
        for p, old in zip(ours[:SPOILT], states):
            new = state_of(opt, p)
            assert new.keys() == old.keys()
            for key in new:
                assert torch.isfinite(new[key]).all()
                if key in ("step", "radius", "rate"):
                    assert torch.equal(new[key], old[key])
                else:  # the element with the bad gradient keeps its state
                    assert same_bits([new[key].view(-1)[:1]], [old[key].view(-1)[:1]])
        for p, q in zip(ours[SPOILT:], without[SPOILT:]):
            assert same_state(state_of(opt, p), state_of(twin, q))
    stats = opt.layer_stats()
    moved = [p for p in ours if not (freezes and p.dim() < 2)]
    assert len(stats["names"]) == len(moved)
    spoilt = [any(p is q for q in ours[:SPOILT]) for p in moved]
    assert stats["skipped"].tolist() == [len(BAD) * s for s in spoilt]
    assert stats["skipped"].dtype == torch.int64
    # and afterwards they take part again
    set_grads(ours, 11)
    counts = [opt.state[p]["step"].item() for p in moved]
    before = copies(moved)
    opt.step()
    assert [opt.state[p]["step"].item() for p in moved] == [c + 1 for c in counts]
    assert all(torch.isfinite(p).all() for p in moved)
    assert not any(same_bits([p], [b]) for p, b in zip(moved, before) if p.dim() >= 2)


@pytest.mark.asked(triton=EVERY)
def test_the_sign_of_what_is_not_finite(engine, wide):
    (p,) = engine.params([torch.zeros(4)], wide)
    opt = layerlr.Lion([p], lr=0.5, on_nonfinite="propagate", backend=engine.backend)
    p.grad = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0]).to(p)
    opt.step()
    expected = torch.tensor([float("nan"), -0.5, 0.5, 0.0], dtype=wide)
    torch.testing.assert_close(p.detach().cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", SHORT, ids=ids(SHORT))
def test_a_first_step_that_is_skipped(engine, case):
    """Nothing is counted or latched: the second step is the first."""
    ours, fresh = skip_model(engine), skip_model(engine)
    opt = engine.make(case, ours, on_nonfinite="skip")
    set_grads(ours, 0)
    for p in ours:
        p.grad.fill_(float("nan"))
    opt.step()
    assert same_bits(ours, fresh)
    assert all(s["step"] == 0 and s.get("radius", s["step"]) == 0 for s in opt.state.values())
    cases.train(opt, ours, 2)
    cases.train(engine.make(case, fresh), fresh, 2)
    assert same_bits(ours, fresh)


def test_skip_is_of_the_whole_layer(engine):
    params = engine.params(random(((3, 2), (3,), (2, 2), (2,)), seed=2), torch.float32)
    named = list(zip(("a.weight", "a.bias", "b.weight", "b.bias"), params))
    opt = layerlr.SGD(named, lr=0.1, rule="singh", layers="module", backend=engine.backend)
    set_grads(params, 0)
    params[1].grad[0] = float("nan")
    before = copies(params)
    opt.step()
    assert same_bits(params[:2], before[:2])
    assert not torch.equal(params[2], before[2]) and not torch.equal(params[3], before[3])
    assert opt.layer_stats()["skipped"].tolist() == [1, 0]
    assert [opt.state[p]["step"].item() for p in params] == [0, 0, 1, 1]


@pytest.mark.parametrize("bad", [(0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_skip_is_of_one_block(engine, bad):
    (p,) = engine.params(random([(6, 4)], seed=2), torch.float32)
    group = {"params": [p], "split": [2, 1, 3]}
    opt = layerlr.SGD([group], lr=0.1, momentum=0.9, rule="layca", backend=engine.backend)
    set_grads([p], 0)
    for block in bad:
        p.grad.split(group["split"])[block][-1, 1] = float("inf")
    before = copies(p.detach().split(group["split"]))
    opt.step()
    kept = [same_bits([x], [y]) for x, y in zip(p.detach().split(group["split"]), before)]
    assert kept == [block in bad for block in range(3)]
    assert opt.layer_stats()["skipped"].tolist() == [int(k) for k in kept]
    # the count is the tensor's: it stands still where every block does
    assert opt.state[p]["step"] == (0 if all(kept) else 1)
    assert torch.isfinite(opt.state[p]["momentum_buffer"]).all()


@pytest.mark.parametrize("rule", ["lars", "lamb", "layca"])
def test_weights_that_are_not_finite_stay_among_themselves(engine, rule):
    ours, alone = skip_model(engine), skip_model(engine)
    case = cases.BY_ID[f"mom-{rule}"]
    opt, twin = engine.make(case, ours), engine.make(case, alone[1:])
    with torch.no_grad():
        ours[0][0, 0] = float("inf")
    before = copies(ours)
    for seed in range(2):
        set_grads(ours, seed)
        for p, q in zip(ours[1:], alone[1:]):
            q.grad = p.grad.clone()
        opt.step()
        twin.step()
    assert same_bits(ours[:1], before[:1])  # its norm is not finite: no factor would be
    assert same_bits(ours[1:], alone[1:])
    assert opt.layer_stats()["skipped"].tolist() == [2] + [0] * 6


@pytest.mark.parametrize("case", RULED[:12], ids=ids(RULED[:12]))
def test_propagate_by_group_key(engine, case):
    ours, twins = skip_model(engine), skip_model(engine)
    groups = [{"params": ours[:4], "on_nonfinite": "propagate"}, {"params": ours[4:]}]
    opt, twin = engine.make(case, groups), engine.make(case, twins)
    for params in (ours, twins):
        set_grads(params, 0)
    ours[0].grad[0, 0] = ours[4].grad[0, 0] = float("nan")
    before = copies(ours)
    opt.step()
    twin.step()
    assert torch.isnan(ours[0]).any()  # torch's way
    assert same_bits([ours[4]], [before[4]])  # the default with a rule
    good = [1, 2, 3, 5, 6]
    assert same_bits([ours[i] for i in good], [twins[i] for i in good])
    assert opt.layer_stats()["skipped"].sum() == 1
    opt.param_groups[0]["on_nonfinite"] = None
    ours[1].grad[0], ours[0].grad = float("nan"), None
    before = copies(ours)
    opt.step()
    assert same_bits(ours[1:2], before[1:2])


@pytest.mark.parametrize("case", SHORT, ids=ids(SHORT))
def test_amp_found_inf_changes_nothing(engine, case):
    params = engine.params(random(((4, 3), (5,)), seed=2), torch.float32)
    opt = engine.make(case, params)
    cases.train(opt, params, 1)
    scaler = torch.amp.GradScaler(engine.device, init_scale=8.0)
    scaler.scale(sum((p * p).sum() for p in params)).backward()
    params[1].grad[0] = float("inf")
    before, skipped = photograph(opt), opt.layer_stats()["skipped"]
    scaler.step(opt)
    scaler.update()
    assert same(photograph(opt), before)
    assert torch.equal(opt.layer_stats()["skipped"], skipped)
    assert scaler.get_scale() == 4.0
