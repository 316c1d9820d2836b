"""What is said once: options that are taken and change nothing."""

from __future__ import annotations

import warnings

import cases
import pytest
import torch
from cases import random, set_grads
from torch import nn
from torch.nn import Parameter

import layerlr
from layerlr.monitor import StatsLog, Telemetry
from layerlr.rules import Lamb


def weights():
    return [Parameter(v) for v in random(((4, 3), (4,), (2, 4)))]


def said(make):
    """The warnings of a call, and what it returns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = make()
    assert all(w.category is UserWarning for w in caught)
    return [str(w.message) for w in caught], result


WARNED = {
    "decay of AdamW": (
        layerlr.AdamW,
        {"rule": "layca", "weight_decay": 0.1},
        ["weight_decay=0.1 has no effect on layers under 'layca'"],
    ),
    "decoupled decay of Adam": (
        layerlr.Adam,
        {"rule": "layca", "weight_decay": 0.1, "decoupled_weight_decay": True},
        ["weight_decay=0.1 has no effect"],
    ),
    "bias correction": (
        layerlr.SGD,
        {"rule": Lamb(bias_correction=False)},
        ["Lamb(bias_correction=False) has no effect on SGD", "Adam and AdamW"],
    ),
    "averaging": (
        layerlr.RMSprop,
        {"rule": Lamb(grad_averaging=False)},
        ["Lamb(grad_averaging=False) has no effect on RMSprop"],
    ),
    "8 bits": (
        layerlr.AdamW,
        {"state_dtype": "8bit"},
        ["state_dtype='8bit' has no effect: no parameter has state that it changes"],
    ),
    "8 bits beside what kahan keeps": (
        layerlr.SGD,
        {"state_dtype": "8bit", "precision": "kahan"},
        ["state_dtype='8bit' has no effect"],
        torch.bfloat16,
    ),
    "layers without a rule": (
        layerlr.SGD,
        {"layers": lambda _, p: "one"},
        ["layers=<function", "has no effect without a rule: was rule='layca' or another meant?"],
    ),
    "second moments in bfloat16": (
        layerlr.AdamW,
        {"state_dtype": "bfloat16"},
        ["second moments in bfloat16 stand still", "beta2 (alpha) of 0.99 or less"],
        torch.float32,
    ),
    "a sum in bfloat16": (
        layerlr.Adagrad,
        {"state_dtype": "bfloat16"},
        ["stand still"],
        torch.float32,
    ),
    "adapt without a rule": (
        layerlr.AdamW,
        {"adapt": "all"},
        ["adapt='all' has no effect without a rule"],
    ),
    "held weights": (
        layerlr.SGD,
        {"precision": "kahan"},
        ["precision='kahan' has no effect: it is for bfloat16 and float16 parameters"],
    ),
}
SILENT = {
    "the default decay": (layerlr.AdamW, {"rule": "layca"}),
    "no decay": (layerlr.AdamW, {"rule": "layca", "weight_decay": 0.0}),
    "decay under lamb": (layerlr.AdamW, {"rule": "lamb", "weight_decay": 0.1}),
    "decay without a rule": (layerlr.AdamW, {"weight_decay": 0.1}),
    "nothing governed": (
        layerlr.AdamW,
        {"rule": "layca", "adapt": "none", "weight_decay": 0.1},
    ),
    "L2, which the buffers see": (layerlr.SGD, {"rule": "layca", "weight_decay": 0.1}),
    "second moments that fall": (
        layerlr.AdamW,
        {"state_dtype": "bfloat16", "betas": (0.9, 0.99)},
        torch.float32,
    ),
    "RMSprop's in bfloat16": (layerlr.RMSprop, {"state_dtype": "bfloat16"}, torch.float32),
    "momentum in bfloat16": (
        layerlr.SGD,
        {"state_dtype": "bfloat16", "momentum": 0.9},
        torch.float32,
    ),
    "adapt for a baseline": (layerlr.SGD, {"rule": None, "adapt": "all"}),
    "adapt that says what is in 8 bits": (
        layerlr.SGD,
        {"adapt": "all", "on_nonfinite": "skip"},
    ),
    "amsgrad": (layerlr.Adam, {"rule": Lamb(bias_correction=False), "amsgrad": True}),
    "averaging on Adam": (layerlr.AdamW, {"rule": Lamb(grad_averaging=False)}),
}


@pytest.mark.parametrize("what", WARNED)
def test_options_without_effect(what):
    cls, options, words, *dtype = WARNED[what]
    groups = [{"params": [Parameter(p.detach().to(*dtype))]} for p in weights()]
    messages, opt = said(lambda: cls(groups, lr=0.1, **options))
    assert len(messages) == 1, messages  # once, not for each group
    assert all(word in messages[0] for word in words)
    opt.param_groups[0]["layers"] = lambda _, p: "two"  # plans are built again
    set_grads([p for group in opt.param_groups for p in group["params"]], 0)
    assert said(opt.step)[0] == []


def test_warnings_point_at_who_called():
    with pytest.warns(UserWarning, match="meant") as caught:
        layerlr.SGD([{"params": weights(), "plainlr": 0.1}], rule="layca")
    assert caught[0].filename == __file__


@pytest.mark.parametrize("what", SILENT)
def test_options_with_effect(what):
    cls, options, *dtype = SILENT[what]
    params = [Parameter(p.detach().to(*dtype)) for p in weights()]
    assert said(lambda: cls(params, lr=0.1, **options))[0] == []


def test_a_rule_that_governs_nothing():
    vectors = [Parameter(torch.ones(4)), Parameter(torch.ones(1, 3))]
    messages, _ = said(lambda: layerlr.SGD(vectors, lr=0.1, rule="layca"))
    assert len(messages) == 1
    assert "rule 'layca' governs none of the parameters, and all take the plain" in messages[0]
    for options in ({"adapt": "all"}, {"adapt": "none"}, {"rule": "singh"}):
        assert (
            said(lambda o=options: layerlr.SGD(vectors, lr=0.1, **{"rule": "layca"} | o))[0] == []
        )
    groups = [{"params": vectors}, {"params": weights()}]  # decay or none, as frameworks sort them
    assert said(lambda: layerlr.SGD(groups, lr=0.1, rule="layca"))[0] == []
    groups = [{"params": [Parameter(torch.ones(64, 64))]}, {"params": vectors}]
    assert said(lambda: layerlr.AdamW(groups, lr=0.1, state_dtype="8bit"))[0] == []
    trunk = Parameter(torch.ones(64, 64), requires_grad=False)  # it may be thawed
    assert said(lambda: layerlr.AdamW([trunk, *vectors], state_dtype="8bit"))[0] == []
    groups = [{"params": [Parameter(torch.ones(2, 2).bfloat16())]}, {"params": vectors}]
    assert said(lambda: layerlr.AdamW(groups, lr=0.1, precision="master"))[0] == []


def test_set_later():
    params = weights()
    opt = layerlr.AdamW(params, rule="layca", weight_decay=0.0)
    opt.param_groups[0].update(weight_decay=0.2, rule=Lamb())
    set_grads(params, 0)
    assert said(opt.step)[0] == []
    opt.param_groups[0]["rule"] = "layca"
    assert len(said(opt.step)[0]) == 1


KEYS = {
    "plainlr": "plain_lr",
    "lrfactor": "lr_factor",
    "layer": "layers",
    "adapts": "adapt",
    "max_gradnorm": "max_grad_norm",
    "on_non_finite": "on_nonfinite",
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("cls", cases.CLASSES)
def test_a_key_that_is_nearly_one_of_ours(cls, key):
    messages, _ = said(lambda: cls([{"params": weights(), key: None}], rule="singh"))
    assert messages == [f"layerlr knows no param-group key {key!r}: was {KEYS[key]!r} meant?"]


def test_adapt_by_names_that_nobody_gave():
    """Said at the first step: a framework may hand names on later, by `attach`."""

    def stepped(adapt, attach=False):
        model = nn.Linear(3, 4)
        opt = layerlr.SGD(model.parameters(), lr=0.1, rule="layca", adapt=adapt)
        if attach:
            opt.attach(model)
        set_grads(model.parameters(), 0)
        return said(opt.step)[0] + said(opt.step)[0]

    def in_a_closure(name, p):
        return any(word in name for word in ("weight",))

    by_name = lambda name, p: not name.startswith("head")  # noqa: E731
    for adapt in (by_name, in_a_closure):
        [message] = stepped(adapt)
        assert "adapt is asked with names such as 'group0.param0'" in message
        assert stepped(adapt, attach=True) == []
    assert stepped(lambda name, p: p.ndim > 1) == []


@pytest.mark.parametrize("theirs", ["Adam", "AdamW", "NAdam", "RAdam", "Rprop", "RMSprop"])
def test_groups_of_torch_s_optimizers_are_not_spoken_of(theirs):
    of = getattr(torch.optim, theirs)(weights())
    assert said(lambda: layerlr.SGD(of.param_groups, lr=0.1, rule="lars"))[0] == []
    opt = layerlr.SGD(weights(), lr=0.1, rule="lars")
    assert said(lambda: opt.load_state_dict(of.state_dict()))[0] == []


def test_a_state_dict_of_timm_s_lamb_is_loaded_quietly():
    groups = [dict(bias_correction=True, grad_averaging=True, trust_clip=False, always_adapt=False)]
    packed = layerlr.AdamW(weights()).state_dict()
    packed["param_groups"][0] |= groups[0] | {"caution": False, "decoupled_decay": False}
    opt = layerlr.AdamW(weights())
    assert said(lambda: opt.load_state_dict(packed))[0] == []


def test_labels_are_not_spoken_of():
    groups = [{"params": weights(), "name": "lamb", "tag": "layca"}]
    assert said(lambda: layerlr.SGD(groups, rule="lars"))[0] == []


def test_foreign_keys_are_not_spoken_of():
    keys = ("initial_lr", "max_lr", "min_lr", "lr_mult", "name", "swa_lr", "use_fallback", "betas")
    group = {"params": weights(), "lr_scale": 0.5} | dict.fromkeys(keys, 0.5)
    group |= {"momentum": 0.5, "nesterov": False, "eps": 1e-8, "dampening": 0.0}
    for cls in (layerlr.SGD, layerlr.Adagrad):
        assert said(lambda cls=cls: cls([dict(group)], rule="singh"))[0] == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("trust", 0.02, "'trust': it belongs to the rule, rule=layerlr.rules.Lars(trust=...)"),
        ("weight_deacy", 0.3, "'weight_deacy': was 'weight_decay' meant?"),
        ("Rule", "layca", "'Rule': a rule is given as rule='layca'"),
        ("layerwise", "lamb", "'layerwise': a rule is given as rule='lamb'"),
        ("always_adapt", True, "'always_adapt': here it is adapt='all' for True"),
    ],
)
def test_a_key_of_a_group_that_belongs_elsewhere(key, value, words):
    groups = [{"params": weights(), key: value}]
    messages, _ = said(lambda: layerlr.SGD(groups, rule="lars"))
    assert messages == [f"layerlr knows no param-group key {words}"]


@pytest.mark.parametrize("cls", cases.CLASSES)
def test_own_keys_are_not_spoken_of(cls):
    assert said(lambda: cls(weights()))[0] == []


def test_an_lr_above_the_one_that_others_follow():
    """OneCycleLR and CyclicLR set a peak of their own."""
    params = weights()
    opt = layerlr.AdamW(params, rule="lamb", plain_lr=4e-3)
    set_grads(params, 0)
    assert said(opt.step)[0] == []
    opt.param_groups[0]["lr"] = 0.02
    [message] = said(opt.step)[0]
    assert "lr=0.02 is above reference_lr=0.001" in message and "20 times" in message
    assert said(opt.step)[0] == []  # once
    group = {"params": weights(), "reference_lr": 0.01}  # chosen
    opt = layerlr.AdamW([group], lr=0.02, rule="lamb", plain_lr=4e-3)
    set_grads(group["params"], 0)
    assert said(opt.step)[0] == []
    opt = layerlr.AdamW(params, lr=0.02, rule="lamb", plain_lr=4e-3)
    for lr in (0.001, 0.02):  # as a warm-up goes
        opt.param_groups[0]["lr"] = lr
        assert said(opt.step)[0] == []


def test_a_list_of_lr_scale_was_ours():
    groups = [{"params": weights(), "lr_scale": [0.5, 1.0]}]
    messages, _ = said(lambda: layerlr.SGD(groups, rule="layca"))
    assert messages == ["layerlr knows no param-group key 'lr_scale': was 'lr_factor' meant?"]


def test_backend_is_not_of_groups():
    groups = [{"params": weights(), "backend": "reference"}]
    messages, _ = said(lambda: layerlr.SGD(groups, rule="layca"))
    assert messages == ["backend is no param-group key and has no effect: give the constructor one"]


@pytest.mark.parametrize("record", [lambda o: Telemetry(o, print, every=1), StatsLog])
def test_what_watches_nothing_says_so(record):
    """Without a rule nothing is measured."""
    params = weights()
    opt = layerlr.SGD(params, lr=0.1)
    watcher = record(opt)
    set_grads(params, 0)

    def step():
        opt.step()
        if isinstance(watcher, StatsLog):
            watcher.record()

    messages, _ = said(step)
    assert len(messages) == 1 and "no layer is measured: give a rule" in messages[0]
    opt.param_groups[0]["on_nonfinite"] = "skip"
    assert said(step)[0] == []


# -- layers that are skipped step after step -----------------------------------------------------


def watched(bad, every):
    """Steps at which telemetry speaks; ``bad``: those whose gradient is not finite."""
    model = nn.Linear(3, 2)
    opt = layerlr.SGD(model.named_parameters(), lr=0.1, rule="layca")
    spoken = []
    with Telemetry(opt, lambda step, table: None, every=every):
        for step in range(1, 61):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            if step in bad:
                model.weight.grad[0, 0] = torch.inf
            messages = said(opt.step)[0]
            spoken += [(step, message) for message in messages]
    return spoken


@pytest.mark.parametrize(("every", "at"), [(1, 30), (4, 32), (15, 45)])
def test_telemetry_names_layers_that_stopped(every, at):
    """Bad from step 21 on: said at the first record that knows of ten skips on end."""
    spoken = watched(range(21, 61), every)
    assert [step for step, _ in spoken] == [at]
    assert "layers weight were skipped in each of the last 10 steps or more" in spoken[0][1]
    assert "bias" not in spoken[0][1]


@pytest.mark.parametrize("every", [1, 4, 15])
def test_telemetry_is_silent_about_single_skips(every):
    assert watched({s for s in range(1, 61) if s % 10}, every) == []
    assert watched({5, 6, 7}, every) == []
