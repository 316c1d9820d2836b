"""Copies and checkpoint libraries: what is copied or saved goes on bit for bit."""

from __future__ import annotations

import multiprocessing
import pickle
from copy import deepcopy

import pytest
import torch
from cases import bits, train
from contract_helpers import (
    each_backend,
    each_rule,
    each_variant,
    make,
    photograph,
    same,
    through_file,
    weights,
)
from torch import nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import state_dict as checkpoint

import layerlr

# -- copies ---------------------------------------------------------------------------------------


@each_variant
@each_rule
@each_backend
@pytest.mark.parametrize("steps", [0, 2])
def test_copies_go_on_exactly_and_apart(variant, rule, backend, steps):
    params = weights(torch.float32)
    opt = make(variant, params, rule, backend=backend)
    train(opt, params, steps)
    copied = deepcopy((opt, params))
    pickled = pickle.loads(pickle.dumps((opt, params)))
    saved = deepcopy(opt.state_dict())
    kept = deepcopy(saved)
    train(opt, params, 2, seed=steps)
    assert same(saved["state"], kept["state"])
    for other, others in (copied, pickled):
        assert other.param_groups[0]["params"][0] is others[0]
        train(other, others, 2, seed=steps)
        assert same(photograph(other), photograph(opt))


@each_rule
@each_backend
def test_a_forked_child_steps_correctly(rule, backend):
    params = weights()
    opt = make("adam", params, rule, backend=backend)
    train(opt, params, 2)

    def child(pipe):
        train(opt, params, 2, seed=2)
        pipe.send([p.detach().numpy() for p in params])

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender,))
    process.start()
    answer = receiver.recv() if receiver.poll(20) else None
    process.join(20)
    assert process.exitcode == 0
    train(opt, params, 2, seed=2)
    assert same([torch.from_numpy(a) for a in answer], [p.detach() for p in params])


def test_share_memory_of_adagrad():
    params = weights()
    params[1].requires_grad_(False)
    opt = layerlr.Adagrad(params)
    opt.share_memory()
    assert all(opt.state[p]["sum"].is_shared() for p in params if p.requires_grad)
    train(opt, params[:1], 1)
    assert opt.state[params[0]]["sum"].any()


def test_share_memory_of_adagrad_in_8_bits():
    p = torch.ones(64, 64, requires_grad=True)
    opt = layerlr.Adagrad([p], state_dtype="8bit")
    opt.share_memory()
    assert opt.state[p]["sum"].is_shared() and opt.state[p]["sum_scale"].is_shared()


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_loaded_state_is_not_cut_to_integers(dtype):
    p = torch.ones(4, 4, requires_grad=True)
    opt = layerlr.Adam([p], rule="layca")
    train(opt, [p], 2)
    saved = deepcopy(opt.state_dict())
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].to(dtype)
    opt.load_state_dict(saved)
    assert opt.state[p]["exp_avg"].dtype == torch.float32  # as torch casts it


def test_optimizers_are_built_under_a_meta_device():
    p = torch.ones(4, 4, requires_grad=True)
    half = torch.ones(4, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.device("meta"):
        opt = layerlr.SGD([p], rule="layca")
        other = layerlr.SGD([half], rule="layca", precision="stochastic")
    train(opt, [p], 1)
    train(other, [half], 1)
    assert torch.isfinite(p).all() and torch.isfinite(half).all()


# -- checkpoint libraries -------------------------------------------------------------------------


@each_variant
@each_rule
@each_backend
@pytest.mark.parametrize("steps", [0, 2])
def test_zero_step_of_checkpoint_libraries_keeps_every_bit(variant, rule, backend, steps):
    """lr 0 and zero gradients on live weights, as torch.distributed.checkpoint resumes."""
    params = weights(torch.bfloat16)
    params[0].data[0] = -0.0
    opt = make(variant, params, rule, backend=backend)
    train(opt, params, steps)
    before = photograph(opt)
    opt.param_groups[0]["lr"] = torch.tensor(0.0) if steps else 0.0
    for gradient in (torch.zeros_like, torch.ones_like):
        for p in params:
            p.grad = gradient(p)
        opt.step(closure=None)
        after = photograph(opt)
        assert same(after["weights"], before["weights"])
        for old, new in zip(before["state"], after["state"], strict=True):
            assert same(old.get("radius"), new.get("radius"))


def _model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


OPTIONS = {
    "default": {},
    "full": {"full_state_dict": True, "cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
}


@each_variant
@each_rule
@pytest.mark.parametrize("options", OPTIONS)
def test_distributed_checkpoint_round_trip(variant, rule, options):
    if (variant, options) == ("sgd", "full") and rule != "layca":
        pytest.skip(reason="torch finds no device where no state has a dimension; its SGD too")
    options = checkpoint.StateDictOptions(**OPTIONS[options])
    model, other_model = _model(), _model()
    opt = make(variant, model.named_parameters(), rule)
    fresh = [bits(p) for p in model.parameters()]
    checkpoint._init_optim_state(opt)
    assert same([bits(p) for p in model.parameters()], fresh)
    train(opt, list(model.parameters()), 2)
    trained = [bits(p) for p in model.parameters()]
    opt.zero_grad()
    saved = checkpoint.get_optimizer_state_dict(model, opt, options=options)
    saved = through_file(saved)
    assert same([bits(p) for p in model.parameters()], trained)

    other_model.load_state_dict(model.state_dict())
    other = make(variant, other_model.named_parameters(), rule, lr=0.9)
    checkpoint.set_optimizer_state_dict(other_model, other, saved, options=options)
    assert same([bits(p) for p in other_model.parameters()], trained)
    assert same(photograph(other), photograph(opt))
    for o, m in ((opt, model), (other, other_model)):
        train(o, list(m.parameters()), 2, seed=2)
    assert same(photograph(other), photograph(opt))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@each_rule
@pytest.mark.parametrize("by_callable", [False, True])
def test_distributed_checkpoint_in_files(rule, by_callable, tmp_path):
    """A fresh optimizer offers its state as the place to load into, so all of it must be there."""
    options = checkpoint.StateDictOptions(flatten_optimizer_state_dict=True)
    choice = {"layers": lambda name, p: name, "adapt": lambda name, p: True} if by_callable else {}
    runs = []
    for part in ("save", "load"):
        model = _model()
        opt = make("adam", model.named_parameters(), rule, **choice)
        if part == "save":
            train(opt, list(model.parameters()), 2)
            opt.zero_grad()
        state = {"model": model.state_dict()}
        state["optimizer"] = checkpoint.get_optimizer_state_dict(model, opt, options=options)
        if part == "save":
            distributed_checkpoint.save(state, checkpoint_id=tmp_path, no_dist=True)
        else:
            distributed_checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
            model.load_state_dict(state["model"])
            checkpoint.set_optimizer_state_dict(model, opt, state["optimizer"], options=options)
        train(opt, list(model.parameters()), 2, seed=2)
        runs.append(photograph(opt))
    assert same(*runs)
