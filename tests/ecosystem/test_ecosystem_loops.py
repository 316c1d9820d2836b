"""The optimizers in loops that people copy: timm's, torchtitan's, torchtune's.

As in `test_ecosystem`: saved and resumed in the middle, a run ends with the same bits.
"""

from __future__ import annotations

import pytest
import torch
from ecosystem import (
    KINDS,
    Net,
    assert_same,
    assert_trained,
    data,
    each_kind,
    timm_installed,
    weights,
)
from torch import nn
from torch.optim import lr_scheduler

import layerlr

# -- timm ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm():
    with timm_installed() as found:
        yield found


def timm_run(timm, kind, file=None, updates=range(8), seed=0, clip="norm"):
    """The loop of timm's train.py: factory, autocast, clip, step, step_update."""
    cls, arguments = KINDS[kind]
    info = timm.registry.OptimInfo("layerwise", cls, has_eps=False, has_momentum=cls is layerlr.SGD)
    timm.registry.default_registry.register(info)
    model = Net(seed)
    opt = timm.optim.create_optimizer_v2(model, "layerwise", weight_decay=0.1, **arguments)
    schedule = timm.scheduler.CosineLRScheduler(
        opt, t_initial=8, warmup_t=2, warmup_lr_init=1e-4, t_in_epochs=False
    )
    if file is not None:
        model_state, opt_state = torch.load(file, weights_only=True)
        model.load_state_dict(model_state)
        opt.load_state_dict(opt_state)
    schedule.step_update(updates.start)
    for update in updates:
        x, y = data()[4 * update : 4 * update + 4]
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, y)["loss"]
        loss.backward(create_graph=False)
        timm.clip(model.parameters(), 0.1, mode=clip)
        opt.step()
        schedule.step_update(num_updates=update + 1)
    return model, opt


@each_kind
@pytest.mark.parametrize("clip", ["norm", "agc"])
def test_timm(timm, tmp_path, kind, clip):
    whole, opt = timm_run(timm, kind, clip=clip)
    assert type(opt) is KINDS[kind][0]
    assert [g["weight_decay"] for g in opt.param_groups] == [0.0, 0.1]
    half, opt = timm_run(timm, kind, updates=range(4), clip=clip)
    torch.save((half.state_dict(), opt.state_dict()), tmp_path / "last.pth.tar")
    resumed, _ = timm_run(timm, kind, tmp_path / "last.pth.tar", range(4, 8), seed=5, clip=clip)
    assert_same(weights(whole), weights(resumed))


def test_timm_lookahead(timm):
    model = Net()
    opt = timm.optim.Lookahead(layerlr.SGD(model.named_parameters(), lr=0.05, rule="layca"), k=2)
    for _ in range(5):
        opt.zero_grad()
        model(*data()[:])["loss"].backward()
        opt.step()
    assert_trained(weights(model))


def test_timm_layer_decay(timm):
    """Its groups carry ``lr_scale``, which its scheduler works into lr, and we do not."""
    rates = []
    for scheduled in (True, False):
        model = Net()
        model.pretrained_cfg = {"classifier": "head"}  # what timm's models say of their layers
        groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.0, layer_decay=0.5)
        scales = [group["lr_scale"] for group in groups]
        if not scheduled:
            groups = [{"lr": 0.05 * group.pop("lr_scale"), **group} for group in groups]
        opt = layerlr.SGD(groups, lr=0.05, rule="singh")
        if scheduled:
            schedule = timm.scheduler.CosineLRScheduler(opt, t_initial=8, t_in_epochs=False)
            schedule.step_update(0)
        model(*data()[:])["loss"].backward()
        opt.step()
        rates.append(opt.layer_stats()["lr"])
    assert len(set(scales)) > 1
    torch.testing.assert_close(*rates)


# -- torchtitan and torchtune: a class, keyword arguments, parts of a model ------------------------


def titan(flags, kind, parts):
    """Optimizers as torchtitan builds them: named groups, its flags in each."""
    cls, arguments = KINDS[kind]
    optimizers = []
    for part in parts:
        decay = [(n, p) for n, p in part.named_parameters() if p.ndim >= 2]
        rest = [(n, p) for n, p in part.named_parameters() if p.ndim < 2]
        groups = [
            {
                "params": [p for _, p in pairs],
                "param_names": [n for n, _ in pairs],
                **flags,
                **arguments,
                "weight_decay": weight_decay,
            }
            for pairs, weight_decay in ((decay, 0.1), (rest, 0.0))
        ]
        optimizers.append(cls(groups))
    return optimizers


FLAGS = [
    {"fused": True, "foreach": False},
    {"fused": False, "foreach": True},
    {"fused": False, "foreach": False},
]


@each_kind
@pytest.mark.parametrize("flags", FLAGS, ids=["fused", "foreach", "for-loop"])
def test_class_and_keyword_arguments_over_model_parts(kind, flags):
    runs = []
    for chosen in (flags, {}):
        model = Net()
        optimizers = titan(chosen, kind, [model.body, model.head])
        schedules = [lr_scheduler.LambdaLR(o, lambda t: 0.9**t) for o in optimizers]
        for _ in range(3):
            model(*data()[:])["loss"].backward()
            for part in (*optimizers, *schedules):
                part.step()
            for opt in optimizers:
                opt.zero_grad()
        runs.append(weights(model))
    assert_same(*runs)


def torchtitan_optimizer():
    """The module of torchtitan that holds its optimizers."""
    name = "torchtitan.components.optimizer"
    return pytest.importorskip(name, reason="torchtitan is not installed", exc_type=ImportError)


def titan_container(kind, model):
    module = torchtitan_optimizer()
    cls, arguments = KINDS[kind]

    class Container(module.OptimizersContainer):
        @staticmethod
        def _resolve_optimizer_factory(name):
            return getattr(layerlr, name)

    groups = [
        module.ParamGroupConfig(
            pattern=pattern, optimizer_name=cls.__name__, optimizer_kwargs={**arguments, **more}
        )
        for pattern, more in ((r"bias$", {"weight_decay": 0.0}), (r".*", {}))
    ]
    config = Container.Config(param_groups=groups, implementation="fused")
    return Container(config, model_parts=[model.body, model.head])


def titan_steps(model, opt, steps):
    for step in steps:
        x, y = data()[4 * step : 4 * step + 4]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, y)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        opt.step()
        opt.zero_grad()


@each_kind
@pytest.mark.filterwarnings("ignore:.*torch.distributed is")
def test_torchtitan_with_a_distributed_checkpoint(tmp_path, kind):
    torchtitan_optimizer()
    import torch.distributed.checkpoint as dcp

    whole = Net()
    opt = titan_container(kind, whole)
    before = weights(whole)
    opt.state_dict()  # makes state with a step of lr 0 where there is none
    assert all(torch.equal(a, b) for a, b in zip(before, weights(whole), strict=True))
    titan_steps(whole, opt, range(4))
    dcp.save({"model": whole.state_dict(), **opt.state_dict()}, checkpoint_id=tmp_path)
    titan_steps(whole, opt, range(4, 8))
    resumed = Net(5)
    opt = titan_container(kind, resumed)
    state = {"model": resumed.state_dict(), **opt.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    resumed.load_state_dict(state.pop("model"))
    opt.load_state_dict(state)
    titan_steps(resumed, opt, range(4, 8))
    assert_same(weights(whole), weights(resumed))


def test_torchtune_config_and_step_in_backward(tmp_path):
    pytest.importorskip("torchtune", reason="torchtune is not installed", exc_type=ImportError)
    from omegaconf import OmegaConf
    from torchtune import config
    from torchtune.training import create_optim_in_bwd_wrapper, register_optim_in_bwd_hooks

    text = "_component_: layerlr.AdamW\nrule: layca\nlr: 0.01\nbetas: [0.8, 0.9]\nfused: True"
    chosen = OmegaConf.create(text)

    def steps(model, steps, opt=None):
        for step in steps:
            model(*data()[4 * step : 4 * step + 4])["loss"].backward()
            if opt is not None:
                opt.step()
                opt.zero_grad()

    def in_backward(model):
        optimizers = {p: config.instantiate(chosen, [p]) for p in model.parameters()}
        register_optim_in_bwd_hooks(model=model, optim_dict=optimizers)
        return create_optim_in_bwd_wrapper(model=model, optim_dict=optimizers)

    plain = Net()
    opt = config.instantiate(chosen, plain.parameters())
    assert type(opt) is layerlr.AdamW and opt.param_groups[0]["fused"] is True
    steps(plain, range(8), opt)
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    torch.load(tmp_path / "opt.pt", weights_only=True)

    whole = Net()
    wrapper = in_backward(whole)
    steps(whole, range(4))
    torch.save(wrapper.state_dict(), tmp_path / "state.pt")
    torch.save(whole.state_dict(), tmp_path / "model.pt")
    steps(whole, range(4, 8))
    assert_same(weights(whole), weights(plain))  # every layer goes its own way
    resumed = Net(5)
    resumed.load_state_dict(torch.load(tmp_path / "model.pt"))
    in_backward(resumed).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(resumed, range(4, 8))
    assert_same(weights(whole), weights(resumed))
