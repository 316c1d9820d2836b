"""State in 8 bits over several processes: the codes are those of the whole tensors."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import same_bits
from ranks import full, run
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Linear, Parameter, Sequential

import layerlr
from layerlr import codes

BACKENDS = ["reference", "cpu", "triton", "simt"]
S0, S1, R = Shard(0), Shard(1), Replicate()

#: rows that no number of processes divides; one that stays in float32
SHAPES = {
    "up": (67, 64),
    "kernel": (66, 8, 4, 4),
    "wide": (32, 256),
    "odd": (45, 98),  # in blocks of 49
    "small": (3, 64),
}
OPTIMIZERS = {
    "layca": lambda p, **more: layerlr.Adam(p, rule="layca", state_dtype="8bit", **more),
    "singh": lambda p, **more: layerlr.SGD(
        p, momentum=0.9, rule="singh", state_dtype="8bit", **more
    ),
    "none": lambda p, **more: layerlr.Adam(p, amsgrad=True, state_dtype="8bit", **more),
}
#: mesh shape, placements by number of dimensions
PLACEMENTS = {
    "rows of 2": ((2,), {2: [S0], 4: [S0]}),
    "rows of 4": ((4,), {2: [S0], 4: [S0]}),
    "hsdp": ((2, 2), {2: [R, S0], 4: [R, S0]}),
}


def values(seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) ** 3 for n, s in SHAPES.items()}


def same_state(sharded, whole):
    """Bits, but for a radius, which is a sum of sums."""
    for key, value in whole.items():
        if key != "radius":
            assert same_bits([full(sharded[key])], [value]), key


def _same_codes(placement, name, backend):
    shape, placements = PLACEMENTS[placement]
    mesh = init_device_mesh("cpu", shape)

    def spread(x):
        return distribute_tensor(x, mesh, placements[x.dim()], src_data_rank=None)

    ours = {n: Parameter(x) for n, x in values(0).items()}
    theirs = {n: Parameter(spread(x.clone())) for n, x in values(0).items()}
    opt = OPTIMIZERS[name](ours.items(), backend="reference")
    sharded = OPTIMIZERS[name](theirs.items(), backend=backend)
    for step in range(3):
        for key, g in values(1 + step).items():
            ours[key].grad, theirs[key].grad = g, spread(g)
        opt.step()
        sharded.step()
    for key, p in ours.items():
        state = sharded.state[theirs[key]]
        if key != "small":
            of_moment = next(k for k in state if k.endswith("_scale")).removesuffix("_scale")
            assert codes.is_codes(state[of_moment]) and isinstance(state[of_moment], DTensor)
            assert state[codes.scale_key(of_moment)].placements == theirs[key].placements
        same_state(state, opt.state[p])
        torch.testing.assert_close(full(theirs[key].detach()), p.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_codes_are_those_of_whole_tensors(placement, name):
    run(4 if placement != "rows of 2" else 2, _same_codes, placement, name, "cpu")


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "cpu"])
def test_engines(backend):
    run(2, _same_codes, "rows of 2", "layca", backend)


def _columns():
    """Pieces of rows, of whole blocks and not."""
    mesh = init_device_mesh("cpu", (2,))
    x, g = torch.randn(32, 256), torch.randn(32, 256)
    dist.broadcast(x, 0)
    dist.broadcast(g, 0)
    p, q = Parameter(distribute_tensor(x.clone(), mesh, [S1])), Parameter(x.clone())
    opt, whole = (OPTIMIZERS["layca"]([z], lr=0.01) for z in (p, q))
    p.grad, q.grad = distribute_tensor(g, mesh, [S1]), g
    opt.step()
    whole.step()
    same_state(opt.state[p], whole.state[q])
    narrow = Parameter(distribute_tensor(torch.ones(64, 64), mesh, [S1]))
    deep = Parameter(distribute_tensor(torch.ones(64, 8, 4, 4), mesh, [S1]))
    for cut in (narrow, deep):
        with pytest.raises(RuntimeError, match=r"blocks of 64.*'weight'.*state_dtype='float32'"):
            OPTIMIZERS["layca"]([("weight", cut)])


def test_shards_that_cut_blocks_are_refused():
    run(2, _columns)


def _model():
    torch.manual_seed(0)
    model = Sequential(Linear(64, 96), torch.nn.Tanh(), Linear(96, 64, bias=False))
    if dist.get_world_size() > 1:
        for part in (*model, model):
            fully_shard(part)
    return model


def _train(model, opt, first, steps):
    """Every process sees the whole batch, so that gradients do not depend on their number."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 64, generator=generator)
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()


def _states(model, opt):
    model_state, opt_state = get_state_dict(model, opt)
    return {"model": model_state, "opt": opt_state}


def _save(folder):
    model = _model()
    opt = OPTIMIZERS["layca"](model.named_parameters(), lr=0.05)
    _train(model, opt, 0, 3)
    dcp.save(_states(model, opt), checkpoint_id=folder)
    state = {n: {k: full(v) for k, v in opt.state[p].items()} for n, p in model.named_parameters()}
    if dist.get_rank() == 0:
        torch.save(state, folder / "state.pt")


def _load(folder):
    model = _model()
    opt = OPTIMIZERS["layca"](model.named_parameters(), lr=0.05)
    states = _states(model, opt)
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=states["model"], optim_state_dict=states["opt"])
    saved = torch.load(folder / "state.pt", weights_only=True)
    for name, p in model.named_parameters():
        for key, value in saved[name].items():
            assert same_bits([full(opt.state[p][key])], [value]), (name, key)
    _train(model, opt, 3, 1)


def test_resharding_changes_no_code(tmp_path):
    (tmp_path / "saved").mkdir()
    run(4, _save, tmp_path / "saved")
    for world in (2, 1):
        run(world, _load, tmp_path / "saved")
