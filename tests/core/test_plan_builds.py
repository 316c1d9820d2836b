"""What is asked and built at each step: counted, not timed."""

from __future__ import annotations

import inspect
import threading
from collections import Counter

import pytest
import torch
from cases import copies, random, same_bits, set_grads, train
from torch.nn import Parameter

import layerlr
from layerlr import advice
from layerlr.monitor import Trace, replay
from layerlr.plans import PlanCache

SHAPES = ((4, 3), (5,), (3, 6))


@pytest.fixture
def counts(monkeypatch):
    """Calls of the plan cache's methods, by name."""
    found = Counter()
    for name in ("_build", "_rescale", "_fits"):
        method = getattr(PlanCache, name)

        def counted(*args, name=name, method=method):
            found[name] += 1
            return method(*args)

        monkeypatch.setattr(PlanCache, name, counted)
    return found


def test_a_replay_of_each_layer_builds_no_plan(counts):
    params = [Parameter(v) for v in random(((4, 3), (3, 6)))]
    named = list(zip(("a", "b"), params, strict=True))
    opt = layerlr.SGD(named, lr=0.1, rule="layca")
    trace = Trace()
    for step in range(1, 8):
        trace(
            step,
            {
                "names": ["a", "b"],
                "angle": torch.tensor([0.01 * step, 0.02 / step], dtype=torch.float64),
            },
        )
    scheduler = replay(trace, opt)
    train(opt, params, 1)
    counts.clear()
    for step in range(2, 7):
        scheduler.step()
        train(opt, params, 1, seed=step)
        wanted = [0.01 * step, 0.02 / step]
        assert opt.layer_stats()["angle"].tolist() == pytest.approx(wanted, rel=1e-9)
    assert counts["_build"] == 0 and counts["_rescale"] == 5


@pytest.mark.parametrize("rule", [None, "layca", "lars"])
def test_rates_that_change_are_those_of_a_new_optimizer(engine, rule, counts):
    """Of lists, of one number, and where part of the group is plain."""
    factors = [2.0, [0.5, 2.0, 0.0][: 2 if rule else 3], 1.0, [3.0, 0.25, 1.0][: 2 if rule else 3]]
    runs = []
    for is_new in (False, True):
        params = engine.params(random(SHAPES))
        options = {"lr": 0.1, "momentum": 0.9, "rule": rule, "backend": engine.backend}
        options |= {"plain_lr": 0.02} if rule else {}
        opt = layerlr.SGD(params, **options)
        counts.clear()
        for step, factor in enumerate(factors):
            opt.param_groups[0]["lr_factor"] = factor
            if is_new:
                opt.plans.rebuild_all()
            set_grads(params, step)
            opt.step()
        if not is_new:
            assert counts["_build"] == 0 and counts["_rescale"] == len(factors)
        runs.append([*params, *(table.stats for plans in opt.plans for table in plans.tables)])
    assert same_bits(*runs)


def test_rates_that_are_refused_change_nothing(counts):
    params = [Parameter(v) for v in random(SHAPES)]
    opt = layerlr.SGD(params, lr=0.1, rule="layca", plain_lr=0.1)
    train(opt, params, 1)
    before = copies(params)
    for factor, message in (([1.0], "1 entries for 2 layers"), ([1.0, -1.0], "Invalid lr_factor")):
        opt.param_groups[0]["lr_factor"] = factor
        with pytest.raises(ValueError, match=message):
            train(opt, params, 1)
    assert same_bits(params, before)
    del opt.param_groups[0]["lr_factor"]
    counts.clear()
    train(opt, params, 1)
    assert not counts["_build"] and not counts["_rescale"]


def test_other_changes_build_plans(counts):
    params = [Parameter(v) for v in random(SHAPES)]
    opt = layerlr.SGD(params, lr=0.1, rule="layca")
    counts.clear()
    opt.param_groups[0].update(lr_factor=0.5, adapt="all")
    train(opt, params, 1)
    opt.param_groups[0]["params"] = params[:1]
    opt.param_groups[0]["lr_factor"] = 0.25
    train(opt, params, 1)
    assert counts["_build"] == 2 and counts["_rescale"] == 0
    opt.release()
    opt.param_groups[0]["lr_factor"] = 0.5
    train(opt, params, 1)
    assert counts["_build"] == 3 and counts["_rescale"] == 0


@pytest.mark.parametrize("rule", ["layca", "lars", "mixed"])
def test_a_wrapper_asks_once_a_step_whether_its_plans_fit(rule, counts):
    params = [Parameter(v) for v in random(SHAPES)]
    groups = [{"params": [p]} for p in params]
    if rule == "mixed":
        groups[1]["rule"], groups[2]["rule"] = None, "lars"
    base = torch.optim.SGD(groups, lr=0.1)
    opt = layerlr.wrap(base, "layca" if rule == "mixed" else rule, lr=0.1)
    train(opt, params, 2)
    counts.clear()
    before = copies(params)
    train(opt, params, 1, seed=2)
    assert counts["_fits"] == len(groups)
    assert not any(torch.equal(p, v) for p, v in zip(params, before, strict=True))


def test_advice_reads_a_signature_once(monkeypatch):
    read = []

    def signature(owner):
        read.append(owner)
        return original(owner)

    original = inspect.signature
    monkeypatch.setattr(advice.inspect, "signature", signature)
    advice._arguments.cache_clear()
    for _ in range(3):
        layerlr.SGD([Parameter(torch.ones(2, 2))], lr=0.1)
    assert read == [layerlr.SGD]


def test_a_step_takes_what_was_found_for_it():
    """A second thread's step may have come between, and what it had staged is gone then."""
    params = [Parameter(v) for v in random(SHAPES, torch.float32)]
    opt = layerlr.Adam(params, rule="lamb", backend="cpu")
    train(opt, params, 1)
    (plans,) = opt.plans.prepared()
    (plan,), numbers = plans.plans, opt.plans.config(plans)
    plan.step(numbers)
    with pytest.raises(RuntimeError, match="two threads step one optimizer at once"):
        plan.step(numbers)


def test_threads_that_share_an_optimizer_are_told():
    """Or they are lucky and take turns; nothing is corrupted."""
    params = [Parameter(v) for v in random([(128, 256)] * 4, torch.float32)]
    params += [Parameter(v.t()[::2]) for v in random([(64, 128)] * 2, torch.float32)]
    opt = layerlr.Adam(params, rule="lamb", backend="cpu")
    set_grads(params, 0)
    said = []

    def run():
        for _ in range(50):
            try:
                opt.step()
            except RuntimeError as error:
                said.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("two threads step one optimizer at once" in words for words in said)
    assert all(p.isfinite().all() for p in params)
