"""A step in two halves, between which the layers' sums may be added to those of other processes."""

from __future__ import annotations

import cases
import layouts
import pytest
import torch
from cases import BY_ID, CASES, SHORT, copies, ids, random, same_bits, set_grads, state_of
from contract_helpers import photograph, same

import layerlr
from layerlr import _C


def config(opt, plans, **numbers):
    found = opt.plans.config(plans)
    for name, value in numbers.items():
        found.put(_C.CONFIG[name], value)
    return found


def halve(opts, between=lambda sums: sums, **numbers):
    """``opt.step()`` of optimizers side by side; ``between`` maps the sums of each, stacked."""
    prepared = [opt.plans.prepared() for opt in opts]
    with torch.no_grad():
        for rows in zip(*prepared, strict=True):
            h = [config(o, p, **numbers) for o, p in zip(opts, rows)]
            for plans in zip(*(p.plans for p in rows), strict=True):
                sums = torch.stack([plan.measure(x) for plan, x in zip(plans, h)])
                for plan, x, mine in zip(plans, h, between(sums)):
                    plan.apply(x, mine)


def norms(opt, **numbers):
    found = []
    with torch.no_grad():
        for plans in opt.plans.prepared():
            h = config(opt, plans, **numbers)
            found += [plan.norms(h) for plan in plans.plans]
    return torch.cat(found)


def stats(opt):
    return [table.stats for plans in opt.plans for table in plans.tables]


ALL = [(c, torch.float32) for c in CASES] + [(c, d) for c in SHORT for d in cases.DTYPES[1:]]


@pytest.mark.parametrize(("case", "dtype"), ALL, ids=lambda x: getattr(x, "id", str(x)))
def test_halves_are_the_step(engine, case, dtype):
    """Also where they take turns with it, some gradients are missing and some are bad."""
    ours, twins = (engine.params(random(cases.SHAPES, seed=3), dtype) for _ in range(2))
    opt, twin = (engine.make(case, p, on_nonfinite="skip") for p in (ours, twins))
    for seed in range(3):
        for params in (ours, twins):
            set_grads(params, seed)
            if seed:
                params[seed].grad = None
                params[0].grad.view(-1)[seed] = float("nan")
        if seed == 1:
            opt.step()
        else:
            halve([opt])
        twin.step()
        assert same(photograph(opt), photograph(twin))
        assert same_bits(stats(opt), stats(twin))


@pytest.mark.parametrize("id", ["nag-singh", "adamw-lars", "ams-layca", "nag-none"])
@pytest.mark.parametrize("layout", [layouts.strided, layouts.transposed, layouts.columns])
def test_other_layouts(engine, layout, id):
    """What is staged is written back when all is done."""
    runs = []
    for halves in (True, False):
        params = [torch.nn.Parameter(layout(v.to(engine.device))) for v in random(((6, 5), (4, 3)))]
        opt = engine.make(BY_ID[id], params, on_nonfinite="skip")
        for seed in range(2):
            for p, g in zip(params, random([p.shape for p in params], seed=seed)):
                p.grad = layouts.strided(g.to(p)) if seed else g.to(p)
            versions = [p._version for p in params]
            halve([opt]) if halves else opt.step()
            assert all(p._version > v for p, v in zip(params, versions))
        runs.append((photograph(opt), stats(opt)))
    assert same(*runs)


#: without the rule that asks for the number of weights: sharded plans tell their parts the whole's
CUT = [case for case in SHORT if case not in cases.OWN]


@pytest.mark.parametrize("case", CUT, ids=ids(CUT))
def test_shards_move_as_the_whole(engine, case):
    """The same layers, cut in two: sums that are added give each part the whole's verdict."""
    shapes = ((7, 40), (9, 3), (5, 1))
    rows = (3, 9, 0)  # of the first part: some, all, none

    def cut(tensors):
        return [[t[:n] for t, n in zip(tensors, rows)], [t[n:] for t, n in zip(tensors, rows)]]

    values = random(shapes, seed=4)
    kwargs = {"on_nonfinite": "skip", "adapt": "all"}
    whole = engine.params(values)
    parts = [engine.params(part) for part in cut(values)]
    opt = engine.make(case, whole, **kwargs)
    opts = [engine.make(case, part, **kwargs) for part in parts]
    for seed in range(3):
        set_grads(whole, seed)
        for part, grads in zip(parts, cut([p.grad for p in whole])):
            for p, g in zip(part, grads):
                p.grad = g.clone()
        opt.step()
        halve(opts, lambda sums: sums.sum(0).expand_as(sums).contiguous())
        for part, expected in zip(parts, cut(copies(whole))):
            torch.testing.assert_close(copies(part), expected, rtol=1e-11, atol=1e-13)
        for part, o in zip(parts, opts):
            for p, q in zip(part, whole):
                for key in ("step", "radius"):
                    mine, theirs = state_of(o, p).get(key), state_of(opt, q).get(key)
                    torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=0)
            mine, theirs = stats(o)[0], stats(opt)[0]
            torch.testing.assert_close(mine[:, 4:], theirs[:, 4:], rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(mine[:, 1], theirs[:, 1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", SHORT, ids=ids(SHORT))
def test_a_bad_sum_elsewhere_skips_the_layer(engine, case):
    ours, twins = (engine.params(random(((6, 5), (5, 2), (4, 3)))) for _ in range(2))
    opt, twin = (engine.make(case, p, on_nonfinite="skip") for p in (ours, twins))
    cases.train(opt, ours, 1)
    cases.train(twin, twins, 1)
    before = copies(ours)
    set_grads(ours, 7)
    set_grads(twins, 7)

    def spoil(sums):
        sums[:, 1, 1] = float("nan")
        return sums

    halve([opt], spoil)
    twin.step()
    assert same_bits([ours[1]], [before[1]])
    assert same_bits([ours[0], ours[2]], [twins[0], twins[2]])
    assert [opt.state[p]["step"].item() for p in ours] == [2, 1, 2]
    assert stats(opt)[0][:, -1].tolist() == [0, 1, 0]


@pytest.mark.parametrize("case", SHORT, ids=ids(SHORT))
def test_found_inf_changes_nothing(engine, case):
    params = engine.params(random(((6, 5), (5,))), torch.float32)
    opt = engine.make(case, params, on_nonfinite="skip")
    cases.train(opt, params, 1)
    before, numbers = photograph(opt), [s.clone() for s in stats(opt)]
    set_grads(params, 1)
    for found in (1.0, torch.tensor(1.0), torch.ones((), device=engine.device)):
        halve([opt], found_inf=found)
        assert same(photograph(opt), before) and same_bits(stats(opt), numbers)


@pytest.mark.parametrize("skip", ["skip", "propagate"])
@pytest.mark.parametrize("case", SHORT, ids=ids(SHORT))
def test_norms(engine, case, skip):
    """Of the gradient as it is, in layers with and without the rule; nothing changes by it."""
    shapes = ((40, 30), (5,), (0, 3), (), (2, 3, 2, 2), (7, 2))
    # each dtype under one of the two, which is asked after the sums: an element does not see it
    for dtype in cases.DTYPES[skip == "skip" :: 2]:
        ours, twins = (engine.params(random(shapes, seed=1), dtype) for _ in range(2))
        opt, twin = (engine.make(case, p, on_nonfinite=skip) for p in (ours, twins))
        for seed in range(2):
            for params in (ours, twins):
                set_grads(params, seed)
                params[-1].grad = None
            before = photograph(opt)
            for sign in (-0.5, torch.tensor(0.5, device=engine.device)):
                found = norms(opt, grad_factor=sign)
                grads = [p.grad.double() * sign for p in ours[:-1] if opt.state.get(p)]
                expected = [*(float((g**2).sum()) for g in grads), 0.0]  # none of the frozen
                assert found.dtype == torch.float64 and found.device == ours[0].device
                assert found.tolist() == pytest.approx(expected, rel=1e-12)
            assert same(photograph(opt), before)
            opt.step()
            twin.step()
            assert same(photograph(opt), photograph(twin))
            assert same_bits(stats(opt), stats(twin))


def test_norms_of_layers(engine):
    """Blocks and modules are summed as the layers that they are."""
    p, q, r = engine.params(random(((6, 4), (4,), (3, 3))))
    named = [("a.weight", p), ("a.bias", q), ("b.weight", r)]
    groups = [{"params": named, "layers": "module"}]
    opt = layerlr.SGD(groups, rule="lars", adapt="all", backend=engine.backend)
    blocks = layerlr.SGD([{"params": [p], "split": 3}], rule="lars", backend=engine.backend)
    set_grads([p, q, r], 0)
    of = [float((g**2).sum()) for g in (p.grad, q.grad, r.grad)]
    assert norms(opt).tolist() == pytest.approx([of[0] + of[1], of[2]], rel=1e-12)
    expected = [float((g**2).sum()) for g in p.grad.split(2)]
    assert norms(blocks).tolist() == pytest.approx(expected, rel=1e-12)
