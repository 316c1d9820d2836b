"""How ``param_groups`` sorts a model."""

from __future__ import annotations

import pytest
import torch
from cases import set_grads
from torch import nn

import layerlr


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.rel_bias = nn.Parameter(torch.ones(3, 3))


class Gpt(nn.Module):
    """What occurs: embeddings, a tied head, norms of vectors and of matrices, a class token."""

    def __init__(self, tied=True):
        super().__init__()
        self.wte = nn.Embedding(7, 4)
        self.pos = nn.Parameter(torch.randn(1, 5, 4))
        self.cls = nn.Parameter(torch.randn(1, 1, 4))
        self.norm = nn.LayerNorm((3, 4))
        self.attention = Attention()
        self.conv = nn.Conv1d(4, 4, 3)
        self.mlp = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 7, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


def sort(model, **options):
    """(governed or plain, decays or not) -> names."""
    groups = layerlr.param_groups(model, **options)
    found = {}
    for group in groups:
        assert group.keys() - {"weight_decay"} == {"params", "param_names", "adapt"}
        assert group["params"] and len(group["params"]) == len(group["param_names"])
        known = dict(model.named_parameters())
        assert all(known[n] is p for n, p in zip(group["param_names"], group["params"]))
        assert group.get("weight_decay", 0.0) == 0.0
        found[group["adapt"], "weight_decay" not in group] = group["param_names"]
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    return found


HIDDEN = ["pos", "attention.qkv.weight", "conv.weight", "mlp.weight"]
BARE = ["cls", "norm.weight", "norm.bias", "attention.rel_bias", "attention.qkv.bias"]
BARE += ["conv.bias", "mlp.bias"]


def test_hidden_matrices_are_governed():
    assert sort(Gpt()) == {
        ("all", True): HIDDEN,
        ("none", True): ["wte.weight"],
        ("none", False): BARE,
    }
    untied = sort(Gpt(tied=False))
    assert untied["none", True] == ["wte.weight", "lm_head.weight"]


MOVES = {
    "plain by name": ({"plain": "pos"}, "pos", ("none", True)),
    "plain by module": ({"plain": ["attention"]}, "attention.qkv.weight", ("none", True)),
    "plain by pattern": ({"plain": "*.qkv.*"}, "attention.qkv.weight", ("none", True)),
    "governed": ({"governed": ("wte",)}, "wte.weight", ("all", True)),
    "governed by its other name": ({"governed": "lm_head.weight"}, "wte.weight", ("all", True)),
    "a governed bias": ({"governed": "mlp.bias"}, "mlp.bias", ("all", False)),
    "a decaying bias": ({"decay": "mlp.bias"}, "mlp.bias", ("none", True)),
    "no decay of a matrix": ({"no_decay": "mlp.weight"}, "mlp.weight", ("all", False)),
    "no decay of an embedding": ({"no_decay": "wte*"}, "wte.weight", ("none", False)),
}


@pytest.mark.parametrize("how", MOVES)
def test_patterns_move_parameters(how):
    options, name, where = MOVES[how]
    model = Gpt()
    usual, found = sort(model), sort(model, **options)
    assert name in found[where] and name not in usual.get(where, [])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plain": "mlpp"}, "plain: 'mlpp' matches no parameter or module"),
        ({"head": ["mlp", "weight"]}, "head: 'weight' matches no"),
        ({"plain": "mlp", "governed": "*.weight"}, "'mlp.weight' matches both governed and plain"),
        ({"decay": "mlp.bias", "no_decay": "*bias"}, "'mlp.bias' matches both decay and no_decay"),
        ({"plain": "*"}, "leaves nothing of Gpt under the rule: name what it should govern"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ValueError) as refused:
        layerlr.param_groups(Gpt(), **options)
    assert words in str(refused.value)


# -- heads ---------------------------------------------------------------------------------------


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))


def asking(name, answer):
    """A network that is asked for its head by this method."""
    model = net()
    setattr(model, name, lambda: answer(model))
    return model


HEADS = {
    "the last": (net(), {}, ["3.weight"]),
    "named": (net(), {"head": "0"}, ["0.weight"]),
    "several": (net(), {"head": ["0", "3"]}, ["0.weight", "3.weight"]),
    "none": (net(), {"head": ()}, []),
    "transformers": (asking("get_output_embeddings", lambda m: m[2]), {}, ["2.weight"]),
    "transformers, of none": (asking("get_output_embeddings", lambda m: None), {}, ["3.weight"]),
    "timm": (asking("get_classifier", lambda m: m[0]), {}, ["0.weight"]),
    "timm, two": (asking("get_classifier", lambda m: (m[0], m[3])), {}, ["0.weight", "3.weight"]),
    "timm, without": (asking("get_classifier", lambda m: nn.Identity()), {}, []),
    "named before asked": (asking("get_classifier", lambda m: m[0]), {"head": "2"}, ["2.weight"]),
    "no linear layer": (nn.Sequential(nn.Conv2d(2, 3, 3)), {}, []),
}


@pytest.mark.parametrize("how", HEADS)
def test_heads(how):
    model, options, heads = HEADS[how]
    assert sort(model, **options).get(("none", True), []) == heads


def test_timm_s_word_on_what_decays():
    model = Gpt()
    model.no_weight_decay = lambda: {"pos", "cls", "dist_token"}
    found = sort(model)
    assert "pos" in found["none", False] and "pos" not in found["all", True]
    assert "pos" in sort(model, governed="pos")["all", False]


def test_the_model_s_word_under_torch_compile():
    """What it wraps is asked, whose names are its own; the word may be one string, or none."""
    model = Gpt()
    model.no_weight_decay = lambda: "pos"
    compiled = layerlr.param_groups(torch.compile(model))
    for one, two in zip(compiled, layerlr.param_groups(model), strict=True):
        assert one["param_names"] == two["param_names"]
    assert "pos" in sort(model)["none", False]
    model.no_weight_decay = lambda: None
    assert "pos" in sort(model)["all", True]


# -- with an optimizer ---------------------------------------------------------------------------


def test_an_optimizer_tells_what_was_done():
    model = Gpt()
    groups = layerlr.param_groups(model, plain="pos")
    opt = layerlr.AdamW(groups, lr=0.02, plain_lr=0.004, weight_decay=0.1, rule="lamb")
    rows = [line.split() for line in layerlr.describe(opt).splitlines()[1:]]
    told = {row[0]: tuple(row[-4:-1]) for row in rows}
    assert told.pop("wte.weight") == ("plain", "0.004", "0.1")
    assert told.pop("pos") == ("plain", "0.004", "0.1")
    for name in HIDDEN[1:]:
        assert told.pop(name) == ("adapted", "0.02", "0.1")
    assert set(told) == set(BARE) and set(told.values()) == {("plain", "0.004", "0")}


def test_steps_are_those_of_groups_by_hand():
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    opt = layerlr.SGD(layerlr.param_groups(model), lr=0.1, rule="layca", plain_lr=0.5)
    named = dict(twin.named_parameters())
    ruled = [named.pop(n) for n in ("0.weight", "2.weight")]
    groups = [{"params": ruled}, {"params": named.values(), "lr": 0.5, "rule": None}]
    other = layerlr.SGD(groups, lr=0.1, rule="layca")
    for seed in range(2):
        for m in (model, twin):
            set_grads(list(m.parameters()), seed)
        opt.step()
        other.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


def test_plain_groups_are_skipped_and_frozen_as_plain_parameters_are():
    model = net()
    opt = layerlr.SGD(layerlr.param_groups(model), lr=0.1, rule="layca")
    set_grads(list(model.parameters()), 0)
    model[3].weight.grad[0, 0] = torch.nan
    before = model[3].weight.detach().clone()
    opt.step()
    assert torch.equal(model[3].weight, before)
    rule = layerlr.rules.Layca(others="freeze")
    opt = layerlr.SGD(layerlr.param_groups(model), lr=0.1, rule=rule)
    model[3].weight.grad[0, 0] = 1.0
    opt.step()
    assert torch.equal(model[3].weight, before)


def test_modules_as_layers():
    groups = layerlr.param_groups(net(), governed=["0", "2"])
    opt = layerlr.SGD(groups, lr=0.1, rule="singh", layers="module")
    layers = [line.split()[3] for line in layerlr.describe(opt).splitlines()[1:]]
    assert len(layers) == 6
    governed = [group["adapt"] == "all" for group in opt.param_groups]
    assert governed == [True, True, False, False]
    assert opt.layer_stats()["names"][:2] == ["0", "2"]


def test_a_list_of_modules_is_no_model():
    with pytest.raises(TypeError, match=r"param_groups wants a torch.nn.Module, got list"):
        layerlr.param_groups([torch.nn.Linear(3, 3)])


@pytest.mark.parametrize("value", [None, 3, [None], b"0"], ids=str)
@pytest.mark.parametrize("key", ["plain", "governed", "decay", "no_decay"])
def test_what_is_no_pattern(key, value):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match=f"Invalid {key}: .*, wanted a pattern, or several"):
        layerlr.param_groups(model, **{key: value})


def test_lazy_modules_are_named():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"'1\.weight' is of a lazy module"):
        layerlr.param_groups(model)
