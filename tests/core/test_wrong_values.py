"""Values that an argument, a rule or a group's key cannot have are refused by name."""

from __future__ import annotations

import math
import re

import cases
import pytest
import torch
from cases import random, same_bits, set_grads
from contract_helpers import photograph, same
from selection import NONE
from torch.nn import Parameter

import layerlr
from layerlr import rules

# The checks are the optimizer's, whatever engine steps.
pytestmark = pytest.mark.asked(triton=NONE, simt=NONE)

WRONG_RULES = [
    (lambda: rules.Lars(trust=-1.0), "Invalid Lars trust: -1.0, wanted a number >= 0"),
    (lambda: rules.Lars(trust=float("nan")), "Invalid Lars trust: nan"),
    (lambda: rules.Lars(eps=-1e-9), "Invalid Lars eps: -1e-09, wanted a number >= 0"),
    (lambda: rules.Lamb(clip=0.0), "Invalid Lamb clip: 0.0, wanted None or a number > 0"),
    (lambda: rules.Layca(radius="first"), "Layca radius: 'first', wanted 'initial' or 'current'"),
    (lambda: rules.Layca(others="stop"), "Layca others: 'stop', wanted 'plain' or 'freeze'"),
    (lambda: rules.Layca(eps=-1.0), "Invalid Layca eps: -1.0, wanted a number >= 0"),
    (
        lambda: rules.Curvature("newton"),
        "Invalid Curvature curvature: 'newton', wanted 'hessian', 'fisher', 'finite-difference' or "
        "'exact'",
    ),
    (lambda: rules.Curvature(negative="keep"), "'keep', wanted 'absolute' or 'reuse'"),
    (lambda: rules.Curvature(likelihood="poisson"), "Invalid Curvature likelihood: 'poisson'"),
    (lambda: rules.Curvature(reduction="none"), "wanted 'mean', 'batchmean' or 'sum'"),
    (lambda: rules.Curvature(damping=-0.1), "damping: -0.1, wanted a finite number >= 0"),
    (lambda: rules.Curvature(damping=float("inf")), "damping: inf, wanted a finite number >= 0"),
    (lambda: rules.Curvature(damping=float("nan")), "damping: nan, wanted a finite number >= 0"),
    (lambda: rules.Curvature(warmup=-1), "warmup: -1, wanted a whole number >= 0"),
    (lambda: rules.Curvature(warmup=1.5), "warmup: 1.5, wanted a whole number >= 0"),
    (lambda: rules.Curvature(min_step=-1e-9), "min_step: -1e-09, wanted a number >= 0"),
    (lambda: rules.Curvature(min_step=float("nan")), "min_step: nan, wanted a number >= 0"),
    (
        lambda: rules.Curvature(min_step=0.2, max_step=0.1),
        "Invalid Curvature max_step: 0.1, wanted None or a number >= min_step",
    ),
    (lambda: rules.Curvature(max_step=float("nan")), "max_step: nan, wanted None or a number"),
    (lambda: rules.Curvature(ema=1.0), "Invalid Curvature ema: 1.0, wanted a number in [0, 1)"),
    (lambda: rules.Curvature(ema=-0.1), "Invalid Curvature ema: -0.1, wanted a number in [0, 1)"),
    (lambda: rules.Curvature(refresh=0), "refresh: 0, wanted a whole number >= 1"),
    (lambda: rules.Curvature(refresh=2.0), "refresh: 2.0, wanted a whole number >= 1"),
    (lambda: rules.Curvature(seed=-1), "seed: -1, wanted a whole number >= 0"),
    (lambda: rules.Lars(trust="1e-3"), "Invalid Lars trust: '1e-3', wanted a number >= 0"),
    (lambda: rules.Lars(trust_clip=None), "Lars trust_clip: None, wanted True or False"),
    (lambda: rules.Lamb(min_ratio=[1, 2]), "min_ratio: [1, 2], wanted None or a number >= 0"),
    (lambda: rules.Layca(max_angle="pi"), "max_angle: 'pi', wanted None or radians in (0, pi]"),
    (lambda: rules.Hyperball(radius=None), "radius: None, wanted 'initial', 'current' or a number"),
    (lambda: rules.BackMatching(ema=None), "ema: None, wanted a number in [0, 1)"),
]


@pytest.mark.parametrize(("make", "message"), WRONG_RULES, ids=[m for _, m in WRONG_RULES])
def test_wrong_rule_values(make, message):
    with pytest.raises(ValueError) as refused:
        make()
    assert message in str(refused.value)


#: arguments -> error, and what its message says
WRONG = [
    ({"rule": "lasr"}, ValueError, ["'lasr'", "'singh', 'lars', 'lamb', 'layca'"]),
    ({"rule": torch.optim.SGD}, TypeError, ["rule must be None, a name", "SGD"]),
    ({"rule": 3}, TypeError, ["rule must be None, a name or a layerlr.rules.LayerRule, got 3"]),
    ({"layers": "block"}, ValueError, ["layers: 'block'", "'tensor', 'module' or a callable"]),
    (
        {"layers": lambda name, p: [name]},
        ValueError,
        ["layers gave ['group", "wanted a key of dicts"],
    ),
    ({"layers": "module"}, ValueError, ["layers='module'", "model.named_parameters()"]),
    (
        {"adapt": "weights"},
        ValueError,
        ["adapt: 'weights'", "'all', 'kernels', 'none' or a callable"],
    ),
    ({"rule": "lars", "plain_lr": -0.1}, ValueError, ["plain_lr: -0.1, wanted None or a finite"]),
    ({"rule": "lars", "plain_lr": float("nan")}, ValueError, ["Invalid plain_lr: nan"]),
    ({"on_nonfinite": "stop"}, ValueError, ["on_nonfinite: 'stop'", "'skip' or 'propagate'"]),
]
WRONG_BACKEND = ({"backend": "gpu"}, ValueError, ["'gpu'", "'auto'", "'reference'"])


@pytest.mark.parametrize("cls", cases.CLASSES)
@pytest.mark.parametrize(("kwargs", "error", "words"), [*WRONG, WRONG_BACKEND])
def test_wrong_arguments(cls, kwargs, error, words):
    with pytest.raises(error) as refused:
        cls([Parameter(torch.ones(2))], **kwargs)
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize("cls", cases.CLASSES)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("trust", "'trust': it belongs to the rule, rule=layerlr.rules.Lars(trust=...)"),
        ("trust_clip", "rules.Lars(trust_clip=...) or rule=layerlr.rules.Lamb(trust_clip=...)"),
        ("split", "'split': it is a key of param groups, {'params': ..., 'split': ...}"),
        (
            "seed",
            "'seed': it is a key of param groups, {'params': ..., 'seed': ...}; or it belongs",
        ),
        ("trust_coefficient", "here it is rule=layerlr.rules.Lars(trust=...)"),
        ("optim_bits", "here it is state_dtype='8bit' for 8"),
        ("weigth_decay", "argument 'weigth_decay': was 'weight_decay' meant?"),
        ("nonsense", "argument 'nonsense'$"),
    ],
)
def test_arguments_that_belong_elsewhere(cls, name, words):
    with pytest.raises(TypeError) as refused:
        cls([Parameter(torch.ones(2))], **{name: 1})
    message = str(refused.value) + "$"
    assert f"{cls.__name__}.__init__() got an unexpected keyword argument {name!r}" in message
    assert words in message


def test_the_flag_that_makes_adamw():
    with pytest.raises(
        TypeError, match=r"AdamW.__init__\(\) got an unexpected .* layerlr.AdamW for"
    ):
        layerlr.AdamW([Parameter(torch.ones(2, 2))], decoupled_weight_decay=True)


def test_a_rule_given_as_something_else():
    with pytest.raises(TypeError, match=r"argument 'layerwise': a rule is given as rule='layca'$"):
        layerlr.SGD([Parameter(torch.ones(2, 2))], layerwise="layca")
    with pytest.raises(ValueError, match=r"adapt: 'Lamb', .*: a rule is given as rule='Lamb'$"):
        layerlr.SGD([Parameter(torch.ones(2, 2))], adapt="Lamb")


#: what is no number -> what the message says; 1e-3 is a string to YAML
NO_NUMBERS = [
    ("SGD", "lr", "1e-3", "Invalid learning rate: '1e-3', wanted a number >= 0"),
    ("SGD", "lr", None, "Invalid learning rate: None, wanted a number >= 0"),
    ("SGD", "momentum", None, "Invalid momentum value: None, wanted a number >= 0"),
    ("SGD", "dampening", "0.1", "Invalid dampening value: '0.1', wanted a number"),
    ("AMomSGD", "momentum", "0.9", "Invalid momentum value: '0.9', wanted a number in [0, 1]"),
    ("Adam", "betas", (0.9,), "Invalid betas: (0.9,), wanted two numbers in [0, 1)"),
    ("Adam", "betas", 0.9, "Invalid betas: 0.9, wanted two numbers in [0, 1)"),
    (
        "Adam",
        "betas",
        (0.9, "0.99"),
        "Invalid beta parameter at index 1: '0.99', wanted",
    ),
    ("Adam", "eps", "1e-8", "Invalid epsilon value: '1e-8', wanted a number >= 0"),
    ("Adam", "weight_decay", [0.1, 0.2], "weight_decay value: [0.1, 0.2], wanted a number >= 0"),
    ("Adam", "plain_lr", "1e-3", "Invalid plain_lr: '1e-3', wanted None or a finite number >= 0"),
    ("Adam", "max_grad_norm", "1", "Invalid max_grad_norm: '1', wanted None or a number >= 0"),
    (
        "Adam",
        "max_grad_norm",
        torch.ones(2),
        "Invalid max_grad_norm: tensor([1., 1.])",
    ),
    ("Adam", "lr", 10**400, "Invalid learning rate: 1000"),
    ("Adam", "precision", ["kahan"], "Invalid precision: ['kahan'], wanted None, 'master'"),
    ("Adam", "backend", ["cpu"], "unknown backend ['cpu'], available are 'auto'"),
]


@pytest.mark.parametrize(("cls", "name", "value", "message"), NO_NUMBERS)
def test_arguments_that_are_no_numbers(cls, name, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(layerlr, cls)([Parameter(torch.ones(2))], **{"rule": "layca", name: value})


@pytest.mark.parametrize(("kwargs", "error", "words"), WRONG)
def test_a_refused_group_leaves_nothing_behind(kwargs, error, words):
    params = [Parameter(v) for v in random(((3, 2), (2,)))]
    opt = layerlr.SGD(params[:1], lr=0.1, rule="singh")
    with pytest.raises(error) as refused:
        opt.add_param_group({"params": params[1:], **kwargs})
    assert all(word in str(refused.value) for word in words)
    assert len(opt.param_groups) == 1 and params[1] not in opt.state
    cases.train(opt, params, 1)
    assert same_bits(params[1:], random(((3, 2), (2,)))[1:])


def test_a_group_key_set_to_nonsense(engine):
    params = engine.params(random(((3, 2), (2,))))
    opt = layerlr.SGD(params, lr=0.1, momentum=0.9, rule="singh", backend=engine.backend)
    set_grads(params, 0)
    for key, value, word in [
        ("rule", "lasr", "'lasr'"),
        ("layers", "block", "'block'"),
        ("adapt", "weights", "'weights'"),
        ("split", 5, "split=5"),
        ("plain_lr", -1.0, "plain_lr: -1.0, wanted None or a finite number >= 0"),
        ("lr_factor", [1.0], "lr_factor has 1 entries for 2 layers"),
        ("lr_factor", -1.0, "lr_factor: -1.0, wanted finite numbers >= 0"),
        ("lr_factor", "x", "lr_factor: 'x', wanted finite numbers >= 0"),
        ("split", "x", "split: 'x', wanted a whole number, or several"),
        ("lr", "1e-3", "lr of param group 0: '1e-3', wanted a number"),
        ("weight_decay", None, "weight_decay of param group 0: None, wanted a number"),
        ("dampening", None, "dampening of param group 0: None, wanted a number"),
        ("max_grad_norm", "1", "max_grad_norm: '1', wanted None or a number >= 0"),
        ("split", [math.inf, 2], "split: .inf, 2., wanted a whole number, or several"),
    ]:
        group = opt.param_groups[0]
        before, missing = photograph(opt), object()
        old = group.get(key, missing)
        group[key] = value
        with pytest.raises(ValueError, match=word):
            opt.step()
        if old is missing:
            del group[key]
        else:
            group[key] = old
        assert same(photograph(opt), before)
    opt.step()  # and goes on


@pytest.mark.parametrize("value", [None, (0.9,), (0.9, "x")])
def test_betas_set_to_nonsense(engine, value):
    params = engine.params(random(((3, 2), (2,))))
    opt = layerlr.Adam(params, lr=0.1, backend=engine.backend)
    set_grads(params, 0)
    before = photograph(opt)
    opt.param_groups[0]["betas"] = value
    with pytest.raises(ValueError, match="Invalid betas of param group 0"):
        opt.step()
    opt.param_groups[0]["betas"] = (0.9, 0.999)
    assert same(photograph(opt), before)


@pytest.mark.parametrize(
    ("cls", "key"),
    [("AdamW", "corrected_decay"), ("SGD", "maximize"), ("SGD", "nesterov"), ("Adam", "amsgrad")],
)
def test_a_string_is_no_flag(cls, key):
    """Configurations have them, and any of them would be true."""
    more = {"momentum": 0.9} if key == "nesterov" else {}
    words = f"Invalid {key} of param group 0: 'false', wanted True or False"
    with pytest.raises(ValueError, match=words):
        getattr(layerlr, cls)([Parameter(torch.ones(2, 2))], **more, **{key: "false"})


def test_what_a_rule_does_not_have():
    with pytest.raises(TypeError, match="rule 'lamb' has no 'trust', known are clip, "):
        layerlr.SGD([Parameter(torch.ones(2, 2))], rule={"name": "lamb", "trust": 10})
    with pytest.raises(ValueError, match=r"unknown rule 'none', .* None \(null in YAML\) for none"):
        layerlr.SGD([Parameter(torch.ones(2, 2))], rule="none")


@pytest.mark.parametrize("option", ["adapt", "layers"])
def test_a_callable_of_one_argument(option):
    params = [("a", Parameter(torch.ones(2, 2)))]
    with pytest.raises(TypeError, match=rf"{option} is called as \(name, param\): too many"):
        layerlr.SGD(params, rule="layca", **{option: lambda p: True})


def test_sizes_of_blocks_from_a_generator():
    params = [Parameter(torch.ones(4, 2)) for _ in range(2)]
    opt = layerlr.SGD([{"params": params, "split": (n for n in (1, 3))}], rule="layca")
    opt.param_groups[0]["layers"] = lambda _, p: id(p)  # plans are built again
    set_grads(params, 0)
    opt.step()
    assert len(opt.layer_stats()["names"]) == 4


def test_a_reference_of_zero():
    with pytest.raises(
        ValueError, match=r"Invalid reference_lr .*: 0.0, wanted a finite number > 0"
    ):
        group = {"params": [Parameter(torch.ones(2, 2))], "reference_lr": 0.0}
        layerlr.SGD([group], lr=0.1, rule="layca", plain_lr=0.1)


def test_a_momentum_of_rmsprop_that_is_no_number():
    opt = layerlr.RMSprop([Parameter(torch.ones(2, 2))], rule="layca")
    opt.param_groups[0]["momentum"] = "x"
    set_grads(opt.param_groups[0]["params"], 0)
    with pytest.raises(ValueError, match="Invalid momentum of param group 0: 'x'"):
        opt.step()
