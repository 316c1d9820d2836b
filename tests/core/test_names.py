"""Names that reach the optimizer by ``attach``, where a framework passes bare parameters."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from cases import copies, same_bits, set_grads
from torch import nn

import layerlr
from layerlr.monitor import Telemetry

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]
PLACES = [f"group0.param{i}" for i in range(4)]


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def train(opt, model, steps=1, seed=0):
    for step in range(steps):
        set_grads(list(model.parameters()), seed + step)
        opt.step()


def names(opt):
    return opt.layer_stats()["names"]


def test_attach_names_bare_parameters(tmp_path):
    model = mlp()
    opt = layerlr.SGD(model.parameters(), lr=0.1, rule="layca")
    path = tmp_path / "layers.jsonl"
    with Telemetry(opt, str(path), every=1):
        train(opt, model)
        assert names(opt) == PLACES
        opt.attach(model)
        assert names(opt) == NAMES
        assert [line.split()[0] for line in layerlr.describe(opt).splitlines()[1:]] == NAMES
        train(opt, model)
    layers = [json.loads(line)["layer"] for line in path.read_text().splitlines()]
    assert layers == PLACES + NAMES
    assert opt.param_groups[0]["param_names"] == NAMES
    model[0].weight.grad = torch.ones_like(model[0].weight).to_sparse()
    with pytest.raises(RuntimeError, match=r"'0\.weight'"):
        opt.step()


def test_attach_changes_no_number():
    """Statistics of the last step and counts of skips stay; the steps have the same bits."""
    model, twin = mlp(), mlp()
    opt, other = (layerlr.Adam(m.parameters(), lr=0.1, rule="layca") for m in (model, twin))
    train(opt, model, 2)
    train(other, twin, 2)
    model[2].weight.grad[0] = torch.nan
    twin[2].weight.grad[0] = torch.nan
    opt.step()
    other.step()
    opt.attach(model)
    mine, theirs = opt.layer_stats(), other.layer_stats()
    assert mine["skipped"].tolist() == [0, 0, 1, 0]
    assert all(torch.equal(mine[key], theirs[key]) for key in mine if key != "names")
    train(opt, model, 2, seed=5)
    train(other, twin, 2, seed=5)
    assert same_bits(model.parameters(), copies(twin.parameters()))


def test_modules_as_layers_after_attach():
    model, twin = mlp(), mlp()
    with pytest.raises(ValueError, match=r"or call optimizer\.attach\(model\) and set"):
        layerlr.SGD(model.parameters(), lr=0.1, rule="singh", layers="module")
    opt = layerlr.SGD(model.parameters(), lr=0.1, rule="singh")
    other = layerlr.SGD(twin.named_parameters(), lr=0.1, rule="singh", layers="module")
    opt.attach(model)
    opt.param_groups[0]["layers"] = "module"
    train(opt, model, 2)
    train(other, twin, 2)
    assert names(opt) == names(other) == ["0", "2"]
    assert same_bits(model.parameters(), copies(twin.parameters()))


def test_the_user_s_names_stay():
    model = mlp()
    mine = [(f"mine.{name}", p) for name, p in model.named_parameters()]
    opt = layerlr.SGD(mine, lr=0.1, rule="singh")
    opt.attach(model)
    assert names(opt) == [name for name, _ in mine]


def test_parameters_of_two_models():
    """Each attach names what is its model's; a parameter of none keeps its place."""
    one, two, extra = mlp(), mlp(1), nn.Parameter(torch.ones(2, 2))
    groups = [{"params": m.parameters()} for m in (one, two)] + [{"params": [extra]}]
    opt = layerlr.SGD(groups, lr=0.1, rule="singh")
    opt.attach(nn.Linear(2, 2))
    assert all("param_names" not in group for group in opt.param_groups)
    opt.attach(one)
    assert names(opt) == NAMES + [f"group1.param{i}" for i in range(4)] + ["group2.param0"]
    opt.attach(two)
    assert names(opt) == [*NAMES, *NAMES, "group2.param0"]


def test_tied_and_compiled_models_have_their_plain_names():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[1].weight = model[0].weight
    opt = layerlr.SGD(model.parameters(), lr=0.1, rule="singh")
    opt.attach(torch.compile(model))
    assert names(opt) == ["0.weight"]


@pytest.mark.parametrize("bare", ["list", "tensor", "generator"])
def test_a_bare_group_that_is_added_later(bare):
    """Lightning's callbacks thaw layers so; torch wants names in all groups or none."""
    model = mlp()
    opt = layerlr.SGD(model[0].parameters(), lr=0.1, rule="singh")
    opt.attach(model)
    assert names(opt) == NAMES[:2]
    p = model[2].weight
    given = {"list": [p], "tensor": p, "generator": (q for q in [p])}[bare]
    opt.add_param_group({"params": given})
    opt.add_param_group({"params": [("mine", model[2].bias)]})
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert names(opt) == [*NAMES[:3], "mine", "group3.param0"]


# -- state dicts: names follow torch's rules -----------------------------------------------------


def test_a_state_dict_of_before_loads_after_and_keeps_the_names():
    model = mlp()
    opt = layerlr.SGD(model.parameters(), lr=0.1, momentum=0.9, rule="layca")
    train(opt, model)
    bare = opt.state_dict()
    assert "param_names" not in bare["param_groups"][0]
    opt.attach(model)
    opt.load_state_dict(bare)
    assert names(opt) == NAMES
    assert opt.state_dict()["param_groups"][0]["param_names"] == NAMES


def test_a_state_dict_of_after_loads_before():
    model, twin = mlp(), mlp()
    opt = layerlr.SGD(model.parameters(), lr=0.1, momentum=0.9, rule="layca")
    other = layerlr.SGD(twin.parameters(), lr=0.1, momentum=0.9, rule="layca")
    opt.attach(model)
    train(opt, model, 2)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert names(other) == NAMES  # as torch's optimizers
    twin.load_state_dict(model.state_dict())
    train(opt, model, seed=5)
    train(other, twin, seed=5)
    assert same_bits(model.parameters(), copies(twin.parameters()))
    torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9).load_state_dict(opt.state_dict())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_have_the_names(way):
    model = mlp()
    opt = layerlr.SGD(model.parameters(), lr=0.1, rule="layca")
    opt.attach(model)
    other = way(opt)
    assert names(other) == NAMES
