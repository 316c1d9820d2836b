"""Layers within a tensor (``split``) and a rate of its own for each layer (``lr_factor``)."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import BY_ID, SHORT, copies, ids, random, same_bits, set_grads
from torch.nn import Parameter

import layerlr

RULES = [rule for rule in cases.RULE_ROWS if rule != "none"]
JOINED = [BY_ID[f"{d}-{rule}"] for d in ("nag", "adamw", "rms-c") for rule in RULES]


def model(engine):
    return engine.params(random(((4, 3), (4,), (2, 4), (2,), (5,)), seed=12))


def blocks(sizes, n):
    return [n // sizes] * sizes if isinstance(sizes, int) else list(sizes)


@pytest.mark.parametrize("case", SHORT, ids=ids(SHORT))
@pytest.mark.parametrize("split", [3, [2, 3, 1], torch.tensor([5, 1]), 1], ids=str)
def test_split_equals_separate_tensors(engine, case, split):
    values = [v.to(d) for v, d in zip(random([(6, 11)] * 2 + [(6,)], seed=5), cases.DTYPES[1:])]
    fused = engine.params(values)
    sizes = blocks(split if isinstance(split, int) else [int(s) for s in split], 6)
    apart = [Parameter(b.clone()) for p in fused for b in p.detach().split(sizes)]
    opt = engine.make(case, [{"params": fused, "split": split}])
    # rows of a kernel are governed, a single one too
    kernels = case.rule is not None and case.rule.adapts == "kernels"
    twin = engine.make(case, apart, adapt=(lambda _, p: p.dim() == 2) if kernels else None)
    for seed in range(2):
        set_grads(fused, seed)
        parts = [g for p in fused for g in p.grad.split(sizes)]
        for p, g in zip(apart, parts):
            p.grad = g.clone()
        opt.step()
        twin.step()
    assert same_bits([b for p in fused for b in p.detach().split(sizes)], copies(apart))
    if case.rule is not None and case.rule.name == "layca" and case.rule.radius == "initial":
        assert opt.state[fused[0]]["radius"].numel() == len(sizes)


@pytest.mark.parametrize("case", JOINED, ids=ids(JOINED))
def test_split_of_modules_joins_block_by_block(engine, case):
    """Fused q, k, v: the rows of the weight and those of the bias."""
    fused = engine.params(random(((6, 4), (6,)), seed=5))
    sizes = [2, 3, 1]
    parts = [Parameter(b.clone()) for p in fused for b in p.detach().split(sizes)]
    named = list(zip(("attention.weight", "attention.bias"), fused))
    opt = engine.make(case, [{"params": named, "split": sizes}], layers="module", adapt="all")
    keys = iter([0, 1, 2, 0, 1, 2])
    order = {str(i): next(keys) for i in range(6)}
    twin = engine.make(
        case,
        [(str(i), p) for i, p in enumerate(parts)],
        layers=lambda name, p: order[name],
        adapt="all",
    )
    for seed in range(2):
        set_grads(fused, seed)
        for p, g in zip(parts, [g for f in fused for g in f.grad.split(sizes)]):
            p.grad = g.clone()
        opt.step()
        twin.step()
    assert same_bits([b for p in fused for b in p.detach().split(sizes)], copies(parts))
    assert opt.layer_stats()["names"] == ["attention[0]", "attention[1]", "attention[2]"]


@pytest.mark.parametrize(
    ("split", "words"),
    [
        (4, ["split=4", "'w'", "6 rows"]),
        (0, ["split=0", "'w'"]),
        (-2, ["split=-2", "'w'"]),
        ([2, 3], ["split=[2, 3]", "'w'", "6 rows"]),
        ([6, 0], ["split=[6, 0]", "'w'"]),
        ([7, -1], ["split=[7, -1]", "'w'"]),
        ([], ["split=[]", "'w'"]),
    ],
)
def test_split_that_does_not_fit(split, words):
    params = [("w", Parameter(torch.ones(6, 2)))]
    with pytest.raises(ValueError) as refused:
        layerlr.SGD([{"params": params, "split": split}], rule="lars")
    assert all(word in str(refused.value) for word in words)


def test_split_is_of_governed_parameters_alone(engine):
    params = engine.params(random(((6, 2), (5,))))
    groups = [{"params": list(zip(("w", "b"), params)), "split": 3}]
    opt = layerlr.SGD(groups, rule="lars", backend=engine.backend)
    assert opt.layer_stats()["names"] == ["w[0]", "w[1]", "w[2]", "b"]


# -- lr_factor -------------------------------------------------------------------------------------


@pytest.mark.asked(triton=("nag-lars", "adamw-lamb", "rms-cm-rated"))
@pytest.mark.parametrize("case", SHORT, ids=ids(SHORT))
def test_lr_factor(engine, case):
    """A number scales every parameter; a list has one for each layer, the others keep lr."""
    governed = [p.dim() >= 2 for p in model(engine)]
    if case.rule is None or case.rule.adapts == "all":
        governed = [True] * 5
    values = layerlr.depth_multipliers(sum(governed), 0.3)
    spread = iter(values)
    each = [next(spread) if g else 1.0 for g in governed]
    for scale, expected in [(0.25, [0.25] * 5), (values, each), (torch.tensor(0.25), [0.25] * 5)]:
        ours, apart = model(engine), model(engine)
        opt = engine.make(case, [{"params": ours, "lr_factor": scale}])
        lr = case.args["lr"]
        twin = engine.make(case, [{"params": [p], "lr": lr * s} for p, s in zip(apart, expected)])
        cases.train(opt, ours, 2)
        cases.train(twin, apart, 2)
        assert same_bits(ours, apart)


def test_lr_factor_is_of_blocks_too(engine):
    ours, apart = (engine.params(random([(4, 3)], seed=1)) for _ in range(2))
    kwargs = {"lr": 0.1, "rule": "layca", "backend": engine.backend}
    opt = layerlr.SGD([{"params": ours, "split": 2, "lr_factor": [0.0, 1.0]}], **kwargs)
    twin = layerlr.SGD([{"params": apart, "split": 2}], **kwargs)
    (before,) = copies(ours)
    cases.train(opt, ours, 2)
    cases.train(twin, apart, 2)
    assert same_bits([ours[0][:2]], [before[:2]]) and same_bits([ours[0][2:]], [apart[0][2:]])


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ([1.0, 2.0], r"lr_factor has 2 entries for 1 layers \(w\)"),
        ([], r"lr_factor has 0 entries for 1 layers"),
        (-0.5, "Invalid lr_factor: -0.5"),
        (float("nan"), "Invalid lr_factor: nan"),
        ([float("inf")], r"Invalid lr_factor: \[inf\]"),
    ],
)
def test_lr_factor_that_does_not_fit(scale, message):
    params = [("w", Parameter(torch.ones(2, 2))), ("b", Parameter(torch.ones(2)))]
    with pytest.raises(ValueError, match=message):
        layerlr.SGD([{"params": params, "lr_factor": scale}], rule="lars")


def test_factors_may_come_one_by_one():
    """A generator is read once, and kept as a list."""
    params = [Parameter(v) for v in random(((4, 3), (3, 2)))]
    group = {"params": params, "lr_factor": (x for x in (0.5, 0.25))}
    opt = layerlr.SGD([group], lr=1.0, rule="layca")
    opt.param_groups[0]["layers"] = lambda name, p: name  # built anew
    set_grads(params, 0)
    opt.step()
    stats = opt.layer_stats()
    assert (stats["lr"] / stats["scale"]).tolist() == pytest.approx([0.5, 0.25])
