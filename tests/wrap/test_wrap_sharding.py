"""Wrapped optimizers under FSDP2 and tensor parallel: the whole model's steps, one message, DCP."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import batch, equal, everywhere_the_same, fsdp, full, models, run, tensor_parallel, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

import layerlr

pytestmark = pytest.mark.full("FSDP")


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def momentum(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


MAKE = {
    "layca": lambda p: layerlr.wrap(adamw(p), "layca", lr=0.05),
    "brake": lambda p: layerlr.wrap(momentum(p), "brake"),
    "lars": lambda p: layerlr.wrap(momentum(p), layerlr.rules.Lars(trust=0.3)),
    "singh": lambda p: layerlr.wrap(adamw(p), "singh", layers="module"),
}


def _trains(kind, names):
    rank = dist.get_rank() if kind == "fsdp" else None
    for name in names:
        whole, model = models(hidden=12)
        if kind == "fsdp":
            fsdp(model)
        else:
            tensor_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),)))
        opt, whole_opt = (MAKE[name](m.named_parameters()) for m in (model, whole))
        train(whole, whole_opt, 10)
        train(model, opt, 10, rank)
        equal(model, whole)
        stats, wanted = opt.layer_stats(), whole_opt.layer_stats()
        assert stats["names"] == wanted["names"]
        for key in ("scale", "lr", "gg"):
            torch.testing.assert_close(stats[key], wanted[key], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("kind", "world"), [("fsdp", 2), ("fsdp", 4), ("tp", 2), ("tp", 4)])
def test_trains_as_the_whole_model(kind, world):
    run(world, _trains, kind, list(MAKE) if world == 2 else ["layca", "lars"])


def _messages():
    for make in MAKE.values():
        _, model = models()
        fsdp(model)
        opt = make(model.named_parameters())
        train(model, opt, 1, dist.get_rank())
        before = full(model.up.weight.detach()).clone()
        with CommDebugMode() as seen:
            opt.step()
        assert seen.get_total_counts() == 1
        with CommDebugMode() as seen:
            opt.base.step()
        assert seen.get_total_counts() == 0  # those were ours
        assert not torch.equal(everywhere_the_same(full(model.up.weight.detach())), before)


@pytest.mark.parametrize("world", [2, 4])
def test_one_message_a_step(world):
    run(world, _messages)


def _states(model, opt, options):
    return {"opt": get_optimizer_state_dict(model, opt, options=options)}


def _round_trip(folder, name):
    """Saved after some steps, loaded into a wrapper that has not stepped, goes on alike."""
    rank, options = dist.get_rank(), StateDictOptions()
    _, model = models()
    fsdp(model)
    opt = MAKE[name](model.named_parameters())
    train(model, opt, 3, rank)
    dcp.save(_states(model, opt, options), checkpoint_id=folder)
    weights = [p.detach().clone() for p in model.parameters()]
    kept = copy.deepcopy({k: v for k, v in opt.base.state[model.up.weight].items()})
    train(model, opt, 3, rank, first=3)
    wanted = [full(p.detach()).clone() for p in model.parameters()]
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(w)
    opt.zero_grad()
    other = MAKE[name](model.named_parameters())
    states = _states(model, other, options)
    dcp.load(states, checkpoint_id=folder)
    set_optimizer_state_dict(model, other, states["opt"], options=options)
    for p, w in zip(model.parameters(), weights, strict=True):
        assert torch.equal(full(p.detach()), full(w))
    for key, value in kept.items():
        assert torch.equal(full(other.base.state[model.up.weight][key]), full(value)), key
    train(model, other, 3, rank, first=3)
    for p, q in zip(model.parameters(), wanted, strict=True):
        assert torch.equal(full(p.detach()), q)


@pytest.mark.parametrize("name", MAKE)
def test_distributed_checkpoints(name, tmp_path):
    run(2, _round_trip, tmp_path / "saved", name)


def _whole(name):
    """A state dict of whole tensors, in memory."""
    options = StateDictOptions(full_state_dict=True)
    whole, model = models()
    fsdp(model)
    opt = MAKE[name](model.named_parameters())
    train(model, opt, 3, dist.get_rank())
    saved = get_optimizer_state_dict(model, opt, options=options)
    whole_opt = MAKE[name](whole.named_parameters())
    train(whole, whole_opt, 3)
    opt.zero_grad()
    other = MAKE[name](model.named_parameters())
    set_optimizer_state_dict(model, other, saved, options=options)
    train(model, other, 3, dist.get_rank(), first=3)
    train(whole, whole_opt, 3, first=3)
    equal(model, whole)


@pytest.mark.parametrize("name", ["layca", "lars"])
def test_whole_state_dicts(name):
    run(2, _whole, name)


def test_flattened_state_dicts_are_refused():
    """torch looks for what the optimizer has, and what the base has is not there."""
    model, _ = models()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    opt = MAKE["layca"](model.named_parameters())
    train(model, opt, 1)
    flat = get_optimizer_state_dict(model, opt, options=options)
    opt.zero_grad()
    with pytest.raises(ValueError, match="use the form that is not flattened"):
        set_optimizer_state_dict(model, opt, flat, options=options)


def _in_parts():
    """One batch for all in two halves: what is measured is the layer, not the shard."""
    whole, model = models()
    fsdp(model)
    opt, whole_opt = (MAKE["layca"](m.parameters()) for m in (model, whole))
    x, y = batch(0)
    for m, o in ((model, opt), (whole, whole_opt)):
        for part in (slice(0, 4), slice(4, 8)):
            torch.nn.functional.mse_loss(m(x[part]), y[part]).backward()
        o.step()
    equal(model, whole)


def test_accumulated_gradients():
    run(2, _in_parts)
