"""Sharded parameters: bad gradients, late and frozen ones, other dtypes and meshes, refusals."""

import pytest
import torch
import torch.distributed as dist
from ranks import everywhere_the_same, full, run
from shard_pairs import ON_EACH, ON_TWO, PLACEMENTS, S0, R, close, fill, pair, same_stats, spread
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import layerlr
from layerlr import rules

CPU = torch.device("cpu")


def _nonfinite(backend):
    """One process has the bad gradient: all leave the layer alone, and go on with the others."""
    shape, placements = PLACEMENTS["rows of 4"]
    mesh = init_device_mesh("cpu", shape)
    for rule in ("singh", "layca", None):
        (ours, opt), (theirs, sharded) = pair(
            mesh,
            placements,
            lambda p, r=rule: layerlr.SGD(
                p, lr=0.1, momentum=0.9, rule=r, on_nonfinite="skip", backend=backend
            ),
        )
        for step in range(3):
            fill(ours, theirs, mesh, placements, step)
            if step == 1:
                ours[0][1].grad[6, 2] = float("nan")
                theirs[0][1].grad = spread(ours[0][1].grad, mesh, placements)
                before = full(theirs[0][1].detach()).clone()
            opt.step()
            sharded.step()
            if step == 1:
                assert torch.equal(full(theirs[0][1].detach()), before)
        for (_, p), (_, q) in zip(ours, theirs, strict=True):
            close(q, p, 1e-9)
            assert sharded.state[q]["step"] == opt.state[p]["step"]
        assert sharded.layer_stats()["skipped"].tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("backend", ON_EACH)
def test_a_bad_gradient_on_one_process_is_everybodys_verdict(backend):
    run(4, _nonfinite, backend)


def _late_and_frozen(backend):
    shape, placements = PLACEMENTS["rows"]
    mesh = init_device_mesh("cpu", shape)
    (ours, opt), (theirs, sharded) = pair(
        mesh, placements, lambda p: layerlr.SGD(p, lr=0.1, rule="layca", backend=backend)
    )
    fill(ours, theirs, mesh, placements, 0)
    for params in (ours, theirs):
        params[2][1].grad = None  # comes late
        params[3][1].requires_grad_(False)
        params[3][1].grad = None
    for step in range(3):
        opt.step()
        sharded.step()
        if step == 0:
            fill(ours, theirs, mesh, placements, 1)
    extra = torch.nn.Parameter(torch.ones(5, 2, dtype=torch.float64))
    extra_sharded = torch.nn.Parameter(spread(extra.detach(), mesh, placements))
    extra.grad = torch.full_like(extra, 0.5)
    extra_sharded.grad = spread(extra.grad, mesh, placements)
    for params, o, p in ((ours, opt, extra), (theirs, sharded, extra_sharded)):
        o.add_param_group({"params": [p], "param_names": ["e"]})
        o.step()
        params.append(("e", p))
    for (_, p), (_, q) in zip(ours, theirs, strict=True):
        close(q, p)
        if isinstance(q.grad, DTensor):
            assert q._local_tensor.grad is None


@pytest.mark.parametrize("backend", ON_TWO)
def test_late_frozen_and_added_parameters(backend):
    run(2, _late_and_frozen, backend)


def _stats(backend, name):
    """A new plan has the sums that the old one had; a layer without gradient keeps its row."""
    shape, placements = PLACEMENTS[name]
    mesh = init_device_mesh("cpu", shape)
    (ours, opt), (theirs, sharded) = pair(
        mesh,
        placements,
        lambda p: layerlr.SGD(p, lr=0.1, momentum=0.9, rule="singh", layers="module"),
    )
    last = opt.layer_stats()["uu"]
    for step in range(5):
        fill(ours, theirs, mesh, placements, step)
        before = opt.layer_stats()
        if step == 1:
            sharded.state[theirs[0][1]] = dict(sharded.state[theirs[0][1]])  # a new plan
        if step == 3:
            ours[-1][1].grad = theirs[-1][1].grad = None
        opt.step()
        sharded.step()
        if step == 1:  # what waited went with the old plan
            assert not sharded.layer_stats()["uu"].any()
        elif step < 3:
            same_stats(opt, before, sharded)
        else:  # the last layer has sums of its step before the last
            late = sharded.layer_stats()["uu"]
            wanted = torch.cat([before["uu"][:-1], last[-1:]])
            torch.testing.assert_close(everywhere_the_same(late), wanted, rtol=1e-9, atol=0)
        last = before["uu"]


@pytest.mark.parametrize("name", ["rows", "columns", "rows then columns"])
def test_statistics_of_gradient_rules(name):
    shape, _ = PLACEMENTS[name]
    run(torch.Size(shape).numel(), _stats, "cpu", name)


def _dtypes(dtype, backend):
    """Elementwise bits are those of whole tensors; a rule's differ by the sums' last bits."""
    shape, placements = PLACEMENTS["rows"]
    mesh = init_device_mesh("cpu", shape)
    for rule, ulps in ((None, 0), ("layca", 2), ("singh", 2)):
        (ours, opt), (theirs, sharded) = pair(
            mesh,
            placements,
            lambda p, r=rule: layerlr.AdamW(p, lr=0.1, rule=r, backend=backend),
            dtype=dtype,
        )
        fill(ours, theirs, mesh, placements, 0)
        opt.step()
        sharded.step()
        for (_, p), (_, q) in zip(ours, theirs, strict=True):
            assert sharded.state[q]["exp_avg"].dtype == torch.float32
            close(q, p, ulps * torch.finfo(dtype).eps, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ON_TWO)
def test_low_precision(dtype, backend):
    run(2, _dtypes, dtype, backend)


def _precision(backend, held):
    """16-bit weights under a rule: as whole tensors, but for the random bits of other parts."""
    shape, placements = PLACEMENTS["rows"]
    mesh = init_device_mesh("cpu", shape)
    (ours, opt), (theirs, sharded) = pair(
        mesh,
        placements,
        lambda p: layerlr.SGD(
            p, lr=1e-3, momentum=0.9, rule="layca", precision=held, backend=backend
        ),
        dtype=torch.bfloat16,
    )
    for step in range(1 if held == "stochastic" else 5):
        fill(ours, theirs, mesh, placements, step)
        opt.step()
        sharded.step()
    for (_, p), (_, q) in zip(ours, theirs, strict=True):
        rtol = torch.finfo(torch.bfloat16).eps if held == "stochastic" else 0
        close(q, p, rtol, 0)
        if held == "stochastic":
            mine = q.detach()._local_tensor
            rows = mine.shape[0]
            assert dist.get_rank() or torch.equal(mine, p.detach()[:rows])
            assert sharded.state[q]["rounding_seed"] == opt.state[p]["rounding_seed"]
        else:
            key = "master" if held == "master" else "compensation"
            assert isinstance(sharded.state[q][key], DTensor)
            close(sharded.state[q][key], opt.state[p][key], 1e-6, 1e-9)


@pytest.mark.parametrize("held", ["master", "kahan", "stochastic"])
@pytest.mark.parametrize("backend", ON_TWO)
def test_precision_of_shards(backend, held):
    run(2, _precision, backend, held)


def _gradients(backend):
    """Placed otherwise, summed yet to be, still on their way."""
    mesh = init_device_mesh("cpu", (2,))
    value, gradient = torch.arange(12.0).view(6, 2), torch.full((6, 2), 3.0)
    for placed in (Replicate(), Shard(1), Partial()):
        p = torch.nn.Parameter(distribute_tensor(value, mesh, [S0]))
        opt = layerlr.SGD([p], lr=0.1, rule="lars", backend=backend)
        part = gradient / 2 if placed.is_partial() else gradient
        if placed.is_partial():
            p.grad = DTensor.from_local(part, mesh, [placed])
        else:
            p.grad = distribute_tensor(part, mesh, [placed])
        opt.step()
        q = torch.nn.Parameter(value.clone())
        whole_opt = layerlr.SGD([q], lr=0.1, rule="lars", backend=backend)
        q.grad = gradient
        whole_opt.step()
        close(p, q, 1e-6)
    version = p._version
    opt.step()
    assert p._version > version


@pytest.mark.parametrize("backend", ON_TWO)
def test_gradients_of_other_placements(backend):
    run(2, _gradients, backend)


def _refusals():
    mesh = init_device_mesh("cpu", (2,))
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [S0]))
    for options in (
        {"rule": rules.Curvature(), "lr": 1.0},
        {"rule": rules.BackMatching(), "lr": 1.0},
        {"differentiable": True},
    ):
        with pytest.raises(ValueError, match=r"group0\.param0.*sharded"):
            layerlr.SGD([p], **options)
    partial = DTensor.from_local(torch.ones(4, 2), mesh, [Partial()])
    with pytest.raises(ValueError, match="redistribute"):
        layerlr.SGD([torch.nn.Parameter(partial)])
    opt = layerlr.SGD([p], lr=0.1)
    opt.param_groups[0]["rule"] = rules.Curvature()
    p.grad = distribute_tensor(torch.ones(4, 2), mesh, [S0])
    before = full(p.detach()).clone()
    with pytest.raises(ValueError, match="curvature"):
        opt.step()
    assert torch.equal(full(p.detach()), before)


def _flattened():
    """FullyShardedDataParallel leaves plain tensors whose layers it has cut anywhere."""
    model = FullyShardedDataParallel(torch.nn.Linear(3, 5), use_orig_params=True, device_id=CPU)
    with pytest.raises(ValueError, match="fully_shard"):
        layerlr.SGD(model.parameters(), rule="singh")
    layerlr.SGD(model.parameters())


def test_flattened_parameters_have_no_layers():
    run(2, _flattened)


def _other_mesh():
    one, two = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), one, [S0]))
    opt = layerlr.SGD([p], momentum=0.9)
    opt.state[p]["momentum_buffer"] = distribute_tensor(torch.ones(4, 2), two, [R, S0])
    with pytest.raises(RuntimeError, match=r"momentum_buffer.*group0\.param0.*reshards"):
        opt.step()


def test_state_of_another_mesh_is_refused():
    run(2, _other_mesh)


def test_what_cannot_be_is_refused():
    run(2, _refusals)


def _unchanged(backend):
    """lr 0 and zero gradients, as checkpoint libraries step to make state: no bit changes."""
    shape, placements = PLACEMENTS["rows of 4"]
    mesh = init_device_mesh("cpu", shape)
    for rule in ("singh", "layca", "lamb", None):
        _, (theirs, opt) = pair(
            mesh, placements, lambda p, r=rule: layerlr.AdamW(p, lr=0.0, rule=r, backend=backend)
        )
        before = [full(p.detach()).clone() for _, p in theirs]
        for _, p in theirs:
            p.grad = torch.zeros_like(p)
        opt.step()
        for (_, p), old in zip(theirs, before, strict=True):
            assert torch.equal(full(p.detach()), old)


@pytest.mark.parametrize("backend", ON_TWO)
def test_the_step_of_checkpoint_libraries_changes_nothing(backend):
    run(4, _unchanged, backend)


def test_one_process_needs_no_messages():
    run(1, _single)


def _single():
    assert dist.get_world_size() == 1
    mesh = init_device_mesh("cpu", (1,))
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [S0]))
    opt = layerlr.SGD([p], lr=0.1, rule="layca")
    p.grad = distribute_tensor(torch.eye(4, 2), mesh, [S0])
    with CommDebugMode() as seen:
        opt.step()
    assert seen.get_total_counts() == 0
    assert not torch.equal(full(p.detach()), torch.ones(4, 2))
