"""Whole models under FSDP2, HSDP, tensor parallel and both: training, checkpoints, backward."""

import copy
import os
import signal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import (
    Toy,
    batch,
    equal,
    everywhere_the_same,
    fsdp,
    full,
    models,
    run,
    tensor_parallel,
    train,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import layerlr

pytestmark = pytest.mark.full("FSDP")

MAKE = {
    "singh": lambda p: layerlr.SGD(p, lr=0.01, momentum=0.9, rule="singh", layers="module"),
    "layca": lambda p: layerlr.SGD(p, lr=0.05, momentum=0.9, rule="layca"),
    "lamb": lambda p: layerlr.AdamW(p, lr=0.01, weight_decay=0.1, rule="lamb"),
    "lars": lambda p: layerlr.Adagrad(p, lr=0.1, lr_decay=0.1, rule="lars"),
    "none": lambda p: layerlr.RMSprop(p, lr=0.01, momentum=0.5, eps=1e-2),
}


_PLAIN = ("step", "radius")  # every process has them whole


def equal_state(opt, model, whole_opt, whole):
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert opt.state[p].keys() == whole_opt.state[q].keys()
        for key, x in opt.state[p].items():
            assert isinstance(x, DTensor) == (isinstance(p, DTensor) and key not in _PLAIN)
            torch.testing.assert_close(full(x), full(whole_opt.state[q][key]), rtol=1e-9, atol=0)


# -- training --------------------------------------------------------------------------------------


def _trains(kind):
    rank = dist.get_rank()
    world = dist.get_world_size()
    part = None
    for make in MAKE.values():
        # what goes through a tensor-parallel layer must divide evenly: torch's rule
        whole, model = models(hidden=12 if "tp" in kind else 11)
        if kind == "ddp":
            part = rank
            model = torch.nn.parallel.DistributedDataParallel(model)
        elif kind == "fsdp":
            part = rank
            fsdp(model)
        elif kind == "hsdp":
            part = rank
            fsdp(model, init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "shard")))
        elif kind == "tp":
            tensor_parallel(model, init_device_mesh("cpu", (world,)))
        else:
            mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
            tensor_parallel(model, mesh["tp"])
            fsdp(model, mesh["dp"])
        opt, whole_opt = make(model.named_parameters()), make(whole.named_parameters())
        train(whole, whole_opt, 20)
        for step in range(20):
            # under FSDP over a mesh of its own, the processes of a tensor-parallel group share data
            x, y = batch(step, part)
            if kind == "fsdp+tp":
                half = dist.get_rank() // (world // 2)
                x, y = (z[4 * half :][:4] for z in batch(step))
            opt.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            opt.step()
        equal(model, whole)


@pytest.mark.parametrize(
    ("kind", "world"),
    [("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("tp", 2), ("fsdp+tp", 4)],
)
def test_trains_as_the_whole_model(kind, world):
    run(world, _trains, kind)


def _mixed_precision():
    """bfloat16 in forward and backward, float32 weights and gradients here."""
    torch.manual_seed(0)
    model = Toy()
    fsdp(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    opt = MAKE["lamb"](model.named_parameters())
    losses = []
    for _ in range(20):
        x, y = (z.float() for z in batch(0, dist.get_rank()))
        opt.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x).float(), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_mixed_precision_policy():
    run(2, _mixed_precision)


def _scaler(overflows):
    """GradScaler's protocol: the verdict is everybody's, and nothing changes on an overflow."""
    whole, model = models()
    fsdp(model)
    rank = dist.get_rank()

    def make(m):
        return layerlr.SGD(m.named_parameters(), lr=0.1, momentum=0.9, rule="layca", fused=True)

    opt, whole_opt = make(model), make(whole)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=100)
    for step in range(4):
        x, y = batch(step, rank)
        opt.zero_grad()
        scaler.scale(torch.nn.functional.mse_loss(model(x), y)).backward()
        if step in overflows and rank == 1:
            model.up.weight.grad._local_tensor[0, 0] = float("inf")
        before = [full(p.detach()).clone() for p in model.parameters()]
        state = [full(x).clone() for s in opt.state.values() for x in s.values()]
        scaler.step(opt)
        scaler.update()
        if step in overflows:
            assert all(
                torch.equal(full(p.detach()), old)
                for p, old in zip(model.parameters(), before, strict=True)
            )
            now = [full(x) for s in opt.state.values() for x in s.values()]
            assert all(torch.equal(x, old) for x, old in zip(now, state, strict=True))
        else:
            train(whole, whole_opt, 1, first=step)
    equal(model, whole, rtol=1e-6)


@pytest.mark.parametrize("overflows", [(0,), (0, 2)], ids=str)
def test_an_overflow_on_one_process_changes_nothing_anywhere(overflows):
    run(2, _scaler, overflows)


# -- checkpoints -----------------------------------------------------------------------------------


def _states(model, opt):
    model_state, opt_state = get_state_dict(model, opt)
    return {"model": model_state, "opt": opt_state}


def _save(folder, name, steps):
    torch.manual_seed(0)
    model = fsdp(Toy().double()) if dist.get_world_size() > 1 else Toy().double()
    opt = MAKE[name](model.named_parameters())
    train(model, opt, steps, dist.get_rank())
    dcp.save(_states(model, opt), checkpoint_id=folder)


def _resume(folder, name, steps, more):
    """Load what other processes, more or fewer, saved; go on; equal the run that never stopped."""
    torch.manual_seed(1)
    model = fsdp(Toy().double()) if dist.get_world_size() > 1 else Toy().double()
    opt = MAKE[name](model.named_parameters())
    states = _states(model, opt)
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=states["model"], optim_state_dict=states["opt"])
    whole, _ = models()
    whole_opt = MAKE[name](whole.named_parameters())
    train(whole, whole_opt, steps)
    equal(model, whole)
    equal_state(opt, model, whole_opt, whole)
    train(model, opt, more, dist.get_rank(), first=steps)
    train(whole, whole_opt, more, first=steps)
    equal(model, whole)


@pytest.mark.parametrize("name", ["layca", "lamb", "lars"])
def test_a_checkpoint_of_4_loads_on_2_and_on_1(name, tmp_path):
    run(4, _save, tmp_path / "saved", name, 5)
    for world in (2, 1):
        run(world, _resume, tmp_path / "saved", name, 5, 3)


def _bit_exact(folder, name):
    torch.manual_seed(0)
    rank = dist.get_rank()
    model = fsdp(Toy())
    opt = MAKE[name](model.named_parameters())

    def steps(first, n):
        for step in range(first, first + n):
            x, y = (z.float() for z in batch(step, rank))
            opt.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            opt.step()

    steps(0, 3)
    dcp.save(_states(model, opt), checkpoint_id=folder)
    steps(3, 3)
    want = [full(p.detach()).clone() for p in model.parameters()]
    opt = MAKE[name](model.named_parameters())
    states = _states(model, opt)
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=states["model"], optim_state_dict=states["opt"])
    steps(3, 3)
    for p, q in zip(model.parameters(), want, strict=True):
        assert torch.equal(full(p.detach()), q)


@pytest.mark.parametrize("name", MAKE)
def test_resumes_to_the_bit(name, tmp_path):
    run(2, _bit_exact, tmp_path / "saved", name)


def _full_state_dict():
    """A state dict of whole tensors, as one process saves with torch.save."""
    torch.manual_seed(0)
    rank = dist.get_rank()
    whole, model = models()
    whole_opt = MAKE["layca"](whole.named_parameters())
    train(whole, whole_opt, 3)
    saved = copy.deepcopy(whole_opt.state_dict())
    with torch.no_grad():
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            p.copy_(q)
    fsdp(model)
    opt = MAKE["layca"](model.named_parameters())
    opt.load_state_dict(saved)
    equal_state(opt, model, whole_opt, whole)
    train(model, opt, 3, rank, first=3)
    train(whole, whole_opt, 3, first=3)
    equal(model, whole)
    options = StateDictOptions(full_state_dict=True)
    _, full_state = get_state_dict(model, opt, options=options)
    other = MAKE["layca"](model.named_parameters())
    set_optimizer_state_dict(model, other, full_state, options=options)
    equal_state(other, model, whole_opt, whole)


def test_full_state_dicts_load_into_shards():
    run(2, _full_state_dict)


def _killed(folder, name):
    """Process 1 dies in the midst of the second save."""
    torch.manual_seed(0)
    model = fsdp(Toy().double())
    opt = MAKE[name](model.named_parameters())
    train(model, opt, 2, dist.get_rank())
    dcp.save(_states(model, opt), checkpoint_id=folder / "2")
    train(model, opt, 2, dist.get_rank(), first=2)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dcp.save(_states(model, opt), checkpoint_id=folder / "4")


def test_a_save_that_is_killed_leaves_the_last_whole_one(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        run(2, _killed, tmp_path, "layca")
    assert not (tmp_path / "4" / ".metadata").exists()
    run(2, _resume, tmp_path / "2", "layca", 2, 3)


# -- stepping inside backward ----------------------------------------------------------------------


def _in_backward(name):
    whole, model = models()
    fsdp(model)
    rank = dist.get_rank()
    opt, whole_opt = MAKE[name](model.named_parameters()), MAKE[name](whole.named_parameters())
    handle = layerlr.step_in_backward(model, opt)
    for step in range(6):
        x, y = batch(step, rank)
        if step == 3:  # two batches
            with handle.accumulate():
                torch.nn.functional.mse_loss(model(x), y).backward()
        torch.nn.functional.mse_loss(model(x), y).backward()
        assert all(p.grad is None for p in model.parameters())
        opt.step()
        x, y = batch(step)
        whole_opt.zero_grad()
        for _ in range(2 if step == 3 else 1):
            torch.nn.functional.mse_loss(whole(x), y).backward()
        whole_opt.step()
    equal(model, whole)
    stats, expected = opt.layer_stats(), whole_opt.layer_stats()
    for key in ("gg", "scale", "lr"):
        torch.testing.assert_close(stats[key], expected[key], rtol=1e-9, atol=1e-12)
    assert (stats["uu"] > 0).all() or name == "none"


@pytest.mark.parametrize("name", ["layca", "singh", "none"])
def test_step_in_backward_under_fsdp(name):
    run(2, _in_backward, name)


# -- what people count -----------------------------------------------------------------------------


def _messages():
    for rule in ("singh", "layca"):
        _, model = models()
        fsdp(model)
        opt = layerlr.SGD(model.parameters(), lr=0.1, momentum=0.9, rule=rule)
        train(model, opt, 1, dist.get_rank())
        with CommDebugMode() as seen:
            opt.step()
        assert seen.get_total_counts() == 1
        with CommDebugMode() as seen:  # one process alone may ask
            stats = opt.layer_stats()
        assert seen.get_total_counts() == 0
        assert (everywhere_the_same(stats["uu"]) > 0).all()


def test_one_message_a_step():
    run(2, _messages)


def test_describe_names_whole_shapes():
    run(2, _describe)


def _describe():
    _, model = models()
    fsdp(model)
    opt = layerlr.SGD(model.named_parameters(), lr=0.1, rule="layca")
    text = layerlr.describe(opt)
    assert "(11, 7)" in text and "up.weight" in text


def _freed():
    _, model = models()
    fsdp(model)
    opt = layerlr.SGD(model.parameters(), lr=0.1, rule="layca")
    train(model, opt, 1, dist.get_rank())
    opt.zero_grad()
    assert all(p.grad is None and p._local_tensor.grad is None for p in model.parameters())


def test_gradients_are_freed():
    run(2, _freed)
