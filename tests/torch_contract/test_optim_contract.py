"""What torch.optim promises about constructors and param groups."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import set_grads, train
from contract_helpers import (
    IN_TORCH,
    TWINS,
    assert_close,
    each_backend,
    each_class,
    each_variant,
    make,
    make_twin,
    named,
    outcome,
    photograph,
    same,
    weights,
)
from torch.nn import Parameter

import layerlr

# -- constructors ------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", IN_TORCH, ids=lambda c: c.__name__)
def test_signature_is_torch_s(ours):
    theirs = inspect.signature(IN_TORCH[ours]).parameters
    mine = inspect.signature(ours).parameters
    shared = [(p.name, p.kind, p.default) for p in mine.values() if p.name in theirs]
    assert shared == [(p.name, p.kind, p.default) for p in theirs.values()]
    added = [p for p in mine.values() if p.name not in theirs]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in added)
    assert {"rule", "layers", "adapt", "backend", "on_nonfinite"} <= {p.name for p in added}


def test_signature_of_amom():
    mine = list(inspect.signature(layerlr.AMomSGD).parameters.values())
    positional = [(p.name, p.default) for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD]
    wanted = [("params", inspect.Parameter.empty), ("lr", 1e-3), ("momentum", 0.9)]
    assert positional == [*wanted, ("weight_decay", 0)]
    assert {"maximize", "foreach", "fused", "capturable", "differentiable"} <= {
        p.name for p in mine if p.kind is p.KEYWORD_ONLY
    }


def test_signature_of_lion():
    mine = list(inspect.signature(layerlr.Lion).parameters.values())
    positional = [(p.name, p.default) for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD]
    wanted = [("params", inspect.Parameter.empty), ("lr", 1e-4), ("betas", (0.9, 0.99))]
    assert positional == [*wanted, ("weight_decay", 0.0)]
    assert {"maximize", "foreach", "fused", "capturable", "differentiable"} <= {
        p.name for p in mine if p.kind is p.KEYWORD_ONLY
    }


ODD_ARGUMENTS = (
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    {"nesterov": True, "momentum": 0.9},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, 1.0)},
    {"betas": (0.9, -0.1)},
    {"betas": (0, 0.9)},
    {"betas": (0.9, torch.tensor(0.99))},
    {"betas": (torch.tensor([0.9]), torch.tensor(0.99))},
    {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": True},
    {"lr": torch.tensor([0.1, 0.1])},
    {"lr": torch.tensor(-0.1)},
    {"lr": torch.tensor(0.1), "foreach": True},
    {"lr": torch.tensor(0.1)},
    {"fused": True, "foreach": True},
    {"fused": True, "differentiable": True},
    {"foreach": True, "differentiable": True},
)


@pytest.mark.parametrize("ours", IN_TORCH, ids=lambda c: c.__name__)
def test_wrong_arguments_are_answered_in_torch_s_words(ours):
    parameters = inspect.signature(IN_TORCH[ours]).parameters
    numbers = [k for k, p in parameters.items() if type(p.default) in (int, float)]
    odd = [a for a in ODD_ARGUMENTS if a.keys() <= parameters.keys()]
    refused = 0
    for arguments in (*({k: -0.5} for k in numbers), *odd):
        wanted = outcome(lambda a=arguments: IN_TORCH[ours](weights(), **a))
        assert outcome(lambda a=arguments: ours(weights(), **a)) == wanted, arguments
        refused += wanted is not None
    assert refused >= 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"momentum": -0.5}, "Invalid momentum value: -0.5"),
        ({"momentum": 1.5}, "Invalid momentum value: 1.5"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
        ({"lr": torch.tensor([0.1, 0.1])}, "Tensor lr must be 1-element"),
    ],
)
def test_wrong_arguments_of_amom(arguments, words):
    with pytest.raises(ValueError, match=words):
        layerlr.AMomSGD(weights(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        ({"betas": (0.9, 0.0)}, "Invalid beta parameter at index 1: 0.0"),
        ({"betas": (0.9, torch.tensor(0.99))}, "betas must be either both floats or both Tensors"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
    ],
)
def test_wrong_arguments_of_lion(arguments, words):
    with pytest.raises(ValueError, match=words):
        layerlr.Lion(weights(), **arguments)


@each_backend
def test_a_group_of_lion_without_memory_is_refused_before_any_change(backend):
    params = weights()
    opt = layerlr.Lion([{"params": params[:2]}, {"params": params[2:]}], backend=backend)
    train(opt, params, 1)
    opt.param_groups[1]["betas"] = (0.9, 0.0)
    before = photograph(opt)
    set_grads(params, 1)
    with pytest.raises(ValueError, match=r"index 1: 0\.0; .* betas=\(0\.0, b\)"):
        opt.step()
    assert same(photograph(opt), before)


# -- param groups ------------------------------------------------------------------------------


def _forms():
    a, b, c, d = weights()
    return {
        "list": [a, b, c, d],
        "generator": (p for p in (a, b, c, d)),
        "dicts": [{"params": [a, b], "lr": 0.5}, {"params": c}, {"params": (d,)}],
        "generator in a dict": [{"params": iter([a, b])}],
        "names": named([a, b, c, d]),
        "generator of names": iter(named([a, b])),
        "names in dicts": [{"params": named([a, b])}, {"params": [("c", c)], "weight_decay": 0.3}],
        "an empty group": [{"params": [a]}, {"params": []}],
        "only an empty group": [{"params": []}],
        "a key of its own": [{"params": [a], "name": "first"}],
        "a tensor": a,
        "nothing": [],
        "a set": [{"params": {a, b}}],
        "a number": [a, 3.0],
        "a number in a dict": [{"params": [a, "b"]}],
        "a mixture": [{"params": [a]}, b],
        "no params": [{"lr": 0.1}],
        "non-leaf": [a * 2],
        "non-leaf that keeps its grad": [_retaining(a)],
        "some names": [("a", a), b],
        "groups with and without names": [{"params": [("a", a)]}, {"params": [b]}],
        "twice in two groups": [{"params": [a, b]}, {"params": [b]}],
    }


def _retaining(p):
    q = p * 2
    q.retain_grad()
    return q


@each_class
@pytest.mark.parametrize("form", _forms())
def test_forms_of_params(ours, form):
    built = {}

    def build(cls):
        built[cls] = cls(_forms()[form])

    wanted = outcome(lambda: build(TWINS[ours]))
    assert outcome(lambda: build(ours)) == wanted
    if wanted is None:
        groups = built[ours].param_groups, built[TWINS[ours]].param_groups
        for mine, theirs in zip(*groups, strict=True):
            shapes = [[p.shape for p in g["params"]] for g in (mine, theirs)]
            assert shapes[0] == shapes[1]
            for key in theirs.keys() - {"params"}:
                assert mine[key] == theirs[key], key


@each_class
def test_duplicates_in_a_group_warn(ours):
    p = weights()[0]
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        ours([p, p])


@each_variant
def test_groups_have_their_own_values(variant):
    if variant == "adagrad" and torch.__version__ < "2.12":
        pytest.skip(reason="torch 2.11's Adagrad makes no state for a group that is added")
    results = []
    for build in (make, make_twin):
        a, b, c, d = params = weights()
        opt = build(
            variant,
            [{"params": [a]}, {"params": b, "lr": 0.003}, {"params": [c], "weight_decay": 0.2}],
        )
        train(opt, params, 3)
        opt.add_param_group({"params": d, "maximize": True})
        train(opt, params, 3, seed=3)
        results.append(params)
    assert_close(*results)


def _refused_groups():
    e = Parameter(torch.ones(3, 2, dtype=torch.float64))
    f = Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False)
    return {
        "rule": ({"params": [("e", e)], "rule": "larc"}, ValueError, "unknown rule 'larc'"),
        "split": ({"params": [("e", e)], "split": 2}, ValueError, "split=2 .*'e'"),
        "layers": ({"params": [("e", e)], "layers": "all"}, ValueError, "Invalid layers: 'all'"),
        "adapt": ({"params": [("e", e)], "adapt": 3}, ValueError, "Invalid adapt: 3"),
        "lr_factor": (
            {"params": [("e", e)], "lr_factor": [1.0, 2.0]},
            ValueError,
            "lr_factor has 2",
        ),
        "dtype": ({"params": [("e", e), ("f", f)]}, ValueError, "'f' has dtype torch.int32"),
        "names": ({"params": [e]}, ValueError, "with/without names"),
        "set": ({"params": {e}}, TypeError, "ordered collections"),
        "list": ([e], TypeError, "param_group must be a dict"),
    }


@each_backend
@pytest.mark.parametrize("case", _refused_groups())
def test_a_refused_group_leaves_nothing_behind(case, backend):
    group, error, words = _refused_groups()[case]
    runs = []
    for refuse in (True, False):
        params = weights()
        opt = make("adam", named(params), "layca", backend=backend)
        train(opt, params, 1)
        if refuse:
            before = photograph(opt), list(opt.state)
            with pytest.raises(error, match=words):
                opt.add_param_group(group)
            assert same(photograph(opt), before[0])
            assert list(map(id, opt.state)) == list(map(id, before[1]))
        extra = Parameter(torch.ones(3, 2, dtype=torch.float64))
        opt.add_param_group({"params": [("extra", extra)]})
        train(opt, [*params, extra], 2, seed=1)
        runs.append(photograph(opt))
    assert same(*runs)


@each_backend
def test_a_group_that_the_backend_refuses_leaves_no_state(backend, monkeypatch):
    params = weights()
    opt = make("adam", params[:2], backend=backend)
    kind = type(layerlr.backends.BACKENDS[backend])
    monkeypatch.setattr(kind, "unsupported", lambda self, spec: "is full")
    with pytest.raises(RuntimeError, match=f"backend '{backend}' is full"):
        opt.add_param_group({"params": params[2:]})
    assert list(map(id, opt.state)) == list(map(id, params[:2]))
    assert len(opt.param_groups) == 1


@each_class
def test_a_refused_constructor_names_the_parameter(ours):
    count = Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    with pytest.raises(ValueError, match=r"'count' has dtype torch.int64"):
        ours([("weight", weights()[0]), ("count", count)])
    with pytest.raises(ValueError, match="unknown backend 'gpu', available are 'auto'"):
        ours(weights(), backend="gpu")
