"""State dicts: what is saved goes on bit for bit."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from cases import bits, train
from contract_helpers import (
    IN_TORCH,
    RULES,
    VARIANTS,
    assert_close,
    each_backend,
    each_rule,
    each_variant,
    make,
    make_twin,
    named,
    photograph,
    same,
    through_file,
    weights,
)
from torch.nn import Parameter

import layerlr

KEYS = {
    "sgd": {"step"},
    "momentum": {"step", "momentum_buffer"},
    "dampened": {"step", "momentum_buffer"},
    "nesterov": {"step", "momentum_buffer"},
    "amom": {"step", "momentum_buffer"},
    "adagrad": {"step", "sum"},
    "rmsprop": {"step", "square_avg"},
    "rmsprop_all": {"step", "square_avg", "momentum_buffer", "grad_avg"},
    "adam": {"step", "exp_avg", "exp_avg_sq"},
    "amsgrad": {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
    "lion": {"step", "exp_avg"},
}
IN_TORCH_VARIANTS = [v for v, (cls, _) in VARIANTS.items() if cls in IN_TORCH]


def resumed(params, dtype):
    """Parameters of another process: equal bits, other tensors."""
    return [Parameter(p) for p in through_file([p.detach() for p in params])]


def plain(value):
    """Whether a state dict holds tensors, numbers, strings, None and containers alone."""
    if isinstance(value, dict):
        return all(map(plain, value)) and all(map(plain, value.values()))
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(plain, value))
    return value is None or type(value) in (int, float, bool, str, torch.Tensor)


# -- saving and resuming -------------------------------------------------------------------------


@each_variant
@each_rule
@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resume_is_exact(variant, rule, backend, dtype):
    params = weights(dtype)
    opt = make(variant, params, rule, backend=backend)
    train(opt, params, 3)
    saved = opt.state_dict()
    assert plain(saved)
    copies = resumed(params, dtype)
    other = make(variant, copies, rule, backend=backend, lr=0.9)
    other.load_state_dict(through_file(saved))
    assert same(photograph(other), photograph(opt))
    train(opt, params, 3, seed=3)
    train(other, copies, 3, seed=3)
    assert same(photograph(other), photograph(opt))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for p in copies:
        dtypes = {k: v.dtype for k, v in other.state[p].items()}
        assert dtypes.pop("step") == torch.float32
        assert all(dtypes.pop(k, torch.float64) == torch.float64 for k in ("radius", "rate"))
        assert set(dtypes.values()) <= {wide}


@each_variant
@each_rule
def test_state_keys_and_ids_are_torch_s(variant, rule):
    params = weights()
    opt = make(variant, named(params), rule)
    for _ in range(2):  # state is there before the first step
        saved = opt.state_dict()
        assert list(saved["state"]) == [0, 1, 2, 3]
        for i, p in enumerate(params):
            kept = {"layca": {"radius"} if p.dim() > 1 else set(), "rated": {"rate"}}
            assert saved["state"][i].keys() == KEYS[variant] | kept.get(rule, set())
            assert saved["state"][i] is opt.state[p]  # as torch's: no copy
        (group,) = saved["param_groups"]
        assert group["params"] == [0, 1, 2, 3]
        assert group["param_names"] == [name for name, _ in named(params)]
        train(opt, params, 1)
    if variant in IN_TORCH_VARIANTS:
        twin = make_twin(variant, theirs := weights())
        train(twin, theirs, 1)
        mine = {k: v for k, v in saved["state"][0].items() if k not in ("radius", "rate", "step")}
        wanted = {k: v for k, v in twin.state_dict()["state"].get(0, {}).items() if k != "step"}
        assert mine.keys() == wanted.keys()
        assert twin.state_dict()["param_groups"][0].keys() <= group.keys()


@pytest.mark.parametrize("rule", [r for r in RULES if r is not None])
def test_a_rule_is_saved_as_its_name_and_numbers(rule):
    opt = layerlr.SGD(weights(), rule=rule)
    seen = []
    opt.register_state_dict_post_hook(lambda _, saved: seen.append(plain(saved)), prepend=True)
    saved = through_file(opt.state_dict())["param_groups"][0]["rule"]
    assert saved["name"] == rule and plain(saved)
    assert seen == [True]  # hooks see what is saved
    other = layerlr.SGD(weights())
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["rule"] == opt.param_groups[0]["rule"]
    assert repr(other) == repr(opt)


def test_numpy_s_numbers_are_saved_as_plain_ones():
    rule = layerlr.rules.Lamb(clip=np.float64(10), trust_clip=np.bool_(True))
    saved = through_file(layerlr.SGD(weights(), rule=rule).state_dict())["param_groups"][0]["rule"]
    assert plain(saved) and (saved["clip"], saved["trust_clip"]) == (10.0, True)


def test_options_of_a_rule_and_of_groups_come_back():
    def build(rules, **options):
        a, b, c, _ = weights()
        groups = [
            {"params": p, "rule": r, **options} for p, r in zip((a, b, c), rules, strict=True)
        ]
        return layerlr.Adam(groups, lr=0.3)

    rules = layerlr.rules.Lamb(clip=3.0, trust_clip=True), None, layerlr.rules.Layca("current")
    opt = build(rules, lr_factor=0.5, on_nonfinite="propagate", adapt="all", split=2)
    other = build(("singh", "lars", None))
    other.load_state_dict(through_file(opt.state_dict()))
    mine, wanted = (photograph(o)["groups"] for o in (other, opt))
    assert mine == wanted
    assert [g["rule"] for g in mine] == list(rules)


def test_the_former_name_of_lr_factor():
    """A list under ``lr_scale`` was ours and is read; a number may be timm's and is left alone."""
    opt = layerlr.SGD(weights(), lr=0.1, rule="layca")
    for value, ours in (([0.5, 2.0], True), (torch.tensor([0.5, 2.0]), True), (0.5, False)):
        saved = opt.state_dict()
        saved["param_groups"][0]["lr_scale"] = value
        other = layerlr.SGD(weights(), lr=0.1, rule="layca")
        other.load_state_dict(saved)
        group = other.param_groups[0]
        assert ("lr_factor" in group) == ours and ("lr_scale" in group) != ours
        lines = [line.split() for line in layerlr.describe(other).splitlines()[1:]]
        rates = [line[-3] for line in lines if "adapted" in line]
        assert rates == (["0.05", "0.2"] if ours else ["0.1", "0.1"])


def test_callables_are_not_saved_and_survive_a_load():
    def build(params, **options):
        return layerlr.SGD([{"params": named(params), **options}], lr=0.1, rule="layca")

    by_layer = {"layers": lambda name, p: name.split(".")[0], "adapt": lambda name, p: True}
    params, copies = weights(), weights()
    opt, other = build(params, **by_layer), build(copies, **by_layer)
    train(opt, params, 2)
    train(other, copies, 1)
    saved = through_file(opt.state_dict())
    assert plain(saved)
    other.load_state_dict(saved)
    for p, q in zip(params, copies, strict=True):
        q.data.copy_(p)
    assert all(other.param_groups[0][key] is f for key, f in by_layer.items())
    assert other.layer_stats()["names"] == ["layer0", "layer1"]
    train(opt, params, 2, seed=2)
    train(other, copies, 2, seed=2)
    assert same(params, copies)


def test_param_names_follow_torch_s_rules():
    results = []
    for cls in (layerlr.SGD, torch.optim.SGD):
        unnamed, first = cls(weights(), lr=0.1), cls(named(weights()), lr=0.1)
        second = cls([(f"other.{n}", p) for n, p in named(weights())], lr=0.1)
        second.load_state_dict(first.state_dict())
        first.load_state_dict(unnamed.state_dict())
        unnamed.load_state_dict(second.state_dict())
        results.append([o.param_groups[0].get("param_names") for o in (first, second, unnamed)])
    assert results[0] == results[1]
    assert results[0][0] == [name for name, _ in named(weights())]


# -- torch.optim's state dicts -------------------------------------------------------------------


@pytest.mark.parametrize("variant", IN_TORCH_VARIANTS)
@pytest.mark.parametrize("steps", [0, 3])
@each_backend
def test_torch_s_state_dicts_load_into_ours(variant, steps, backend):
    theirs, mine = weights(), weights()
    twin = make_twin(variant, theirs)
    train(twin, theirs, steps)
    opt = make(variant, mine, backend=backend, lr=0.5)
    train(opt, mine, 1, seed=9)
    for p, q in zip(mine, theirs, strict=True):
        p.data.copy_(q)
    opt.load_state_dict(through_file(twin.state_dict()))
    assert opt.param_groups[0]["lr"] == twin.param_groups[0]["lr"]
    train(twin, theirs, 3, seed=3)
    train(opt, mine, 3, seed=3)
    assert_close(mine, theirs)


@pytest.mark.parametrize("variant", IN_TORCH_VARIANTS)
def test_ours_load_into_torch_s(variant):
    theirs, mine = weights(), weights()
    opt, twin = make(variant, mine), make_twin(variant, theirs)
    train(opt, mine, 3)
    for p, q in zip(mine, theirs, strict=True):
        q.data.copy_(p)
    twin.load_state_dict(through_file(opt.state_dict()))
    train(twin, theirs, 3, seed=3)
    train(opt, mine, 3, seed=3)
    assert_close(mine, theirs)


@pytest.mark.parametrize("variant", ["momentum", "dampened", "nesterov"])
@each_backend
def test_a_momentum_buffer_of_none_loads(variant, backend):
    runs = []
    for build, options in ((make, {"backend": backend}), (make_twin, {})):
        params = weights()
        opt = build(variant, params, **options)
        train(opt, params, 2)
        saved = deepcopy(make_twin(variant, weights()).state_dict())
        saved["state"] = {i: {"momentum_buffer": None} for i in range(4)}
        opt.load_state_dict(saved)
        train(opt, params, 2, seed=2)
        runs.append(params)
    assert_close(*runs)


@each_backend
def test_torch_s_state_loads_under_a_rule_that_stays(backend):
    theirs, mine = weights(), weights()
    twin, opt = make_twin("adam", theirs), make("adam", mine, backend=backend)
    train(twin, theirs, 2)
    opt.param_groups[0].update(rule="layca", lr_factor=0.5)
    opt.load_state_dict(twin.state_dict())
    assert opt.param_groups[0]["rule"] == layerlr.rules.Layca()
    assert opt.param_groups[0]["lr_factor"] == 0.5
    norms = [p.norm().item() for p in mine]
    train(opt, mine, 2, seed=2)
    assert [p.norm().item() for p in mine][::2] == pytest.approx(norms[::2], rel=1e-12)
    assert opt.state[mine[0]]["step"] == 4


# -- dtypes, errors, hooks -----------------------------------------------------------------------


@each_variant
@pytest.mark.parametrize("saved_in", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("loaded_in", [torch.float32, torch.bfloat16, torch.float64])
def test_state_keeps_its_saved_dtype(variant, saved_in, loaded_in):
    params, others = weights(saved_in), weights(loaded_in)
    opt = make(variant, params, "layca")
    train(opt, params, 2)
    other = make(variant, others, "layca")
    other.load_state_dict(opt.state_dict())
    assert same(photograph(other)["state"], photograph(opt)["state"])
    before = [bits(p) for p in others]
    train(other, others, 1, seed=2)
    assert [p.dtype for p in others] == [loaded_in] * 4
    assert not any(same(bits(p), b) for p, b in zip(others, before, strict=True))
    assert all(p.isfinite().all() for p in others)


def _spoilt(saved, how):
    saved = deepcopy(saved)
    first = saved["param_groups"][0]
    if how == "groups":
        saved["param_groups"].append({**first, "params": []})
    elif how == "size":
        first["params"] = first["params"][:-1]
    elif how == "rule":
        first["rule"] = {"name": "larc"}
    elif how == "option":
        first["rule"] = {"name": "lars", "eeta": 1.0}
    elif how == "value":
        first["rule"] = {"name": "lars", "trust": -1.0}
    elif how == "split":
        first["split"] = 3
    elif how == "layers":
        first["layers"] = "rows"
    else:
        saved["state"][2][how] = torch.zeros(7, dtype=torch.float64)
    return saved


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("groups", ValueError, "loaded state dict has a different number of parameter groups"),
        ("size", ValueError, "a parameter group that doesn't match the size of optimizer's group"),
        ("rule", ValueError, "unknown rule 'larc'"),
        ("option", TypeError, "eeta"),
        ("value", ValueError, "Invalid Lars trust"),
        ("split", ValueError, "split=3 .*'layer0.weight'"),
        ("layers", ValueError, "Invalid layers: 'rows'"),
        ("exp_avg", RuntimeError, "'exp_avg' of parameter 'layer1.weight' has shape"),
    ],
)
@each_backend
def test_a_refused_load_leaves_the_optimizer_as_it_was(how, error, words, backend):
    params, untouched = weights(), weights()
    opt = make("adam", named(params), "layca", backend=backend)
    oracle = make("adam", named(untouched), "layca", backend=backend)
    train(opt, params, 2)
    train(oracle, untouched, 2)
    before = photograph(opt), opt.state, opt.param_groups
    with pytest.raises(error, match=words):
        opt.load_state_dict(_spoilt(opt.state_dict(), how))
    assert same(photograph(opt), before[0])
    assert opt.state is before[1] and opt.param_groups is before[2]
    train(opt, params, 2, seed=2)
    train(oracle, untouched, 2, seed=2)
    assert same(photograph(opt), photograph(oracle))
    assert len(opt._optimizer_load_state_dict_pre_hooks) == 0


@pytest.mark.parametrize("cls", [layerlr.Adam, torch.optim.Adam])
def test_hooks_of_state_dicts_run_in_torch_s_order(cls):
    seen = []

    def note(word, result=None):
        return lambda *_: seen.append(word) or result

    opt = cls(weights(), lr=0.1)
    opt.register_state_dict_pre_hook(note("pre 1"))
    opt.register_state_dict_pre_hook(note("pre 0"), prepend=True)
    opt.register_state_dict_post_hook(lambda _, saved: seen.append(saved["param_groups"][0]["lr"]))
    opt.register_state_dict_post_hook(lambda _, saved: {**saved, "extra": 1})
    opt.register_state_dict_post_hook(note("post 0"), prepend=True)
    saved = opt.state_dict()
    assert saved["extra"] == 1
    assert seen == ["pre 0", "pre 1", "post 0", 0.1]

    seen.clear()
    group = {**saved["param_groups"][0], "lr": 0.7}
    changed = {**saved, "param_groups": [group]}
    opt.register_load_state_dict_pre_hook(lambda o, s: seen.append(s["param_groups"][0]["lr"]))
    opt.register_load_state_dict_pre_hook(note("pre 0", changed), prepend=True)
    opt.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    opt.register_load_state_dict_post_hook(note("post 0"), prepend=True)
    opt.load_state_dict(saved)
    assert seen == ["pre 0", 0.7, "post 0", 0.7]
    assert saved["param_groups"][0]["lr"] == 0.1


def test_a_pre_hook_may_replace_the_state():
    params, mine = weights(torch.bfloat16), weights(torch.bfloat16)
    source, opt = layerlr.Adam(params), layerlr.Adam(mine)
    train(source, params, 2)
    opt.register_load_state_dict_pre_hook(lambda *_: source.state_dict())
    opt.load_state_dict({"state": {}, "param_groups": []})
    assert same(photograph(opt)["state"], photograph(source)["state"])
