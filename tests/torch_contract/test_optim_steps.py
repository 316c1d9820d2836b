"""What torch.optim promises about steps."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import set_grads, train
from contract_helpers import (
    CLASSES,
    IN_TORCH,
    assert_close,
    each_backend,
    each_class,
    each_rule,
    each_variant,
    make,
    make_twin,
    named,
    one_backend,
    outcome,
    photograph,
    same,
    weights,
)
from torch import nn
from torch.nn import Parameter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import layerlr

# -- steps -------------------------------------------------------------------------------------


@each_variant
@each_rule
@one_backend
def test_closure(variant, rule, backend):
    params = weights()
    opt = make(variant, params, rule, backend=backend)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    with torch.no_grad():
        first = opt.step(closure)
        second = opt.step(closure=closure)
        assert not torch.is_grad_enabled()
    assert calls == [True, True]
    assert first.requires_grad and second < first
    assert opt.step() is None
    assert torch.is_grad_enabled()


@each_class
def test_profiler_and_hooks_see_one_step(ours):
    seen = []
    opt = ours(weights())
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", args, kwargs)))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", args, kwargs)))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("first")),
        register_optimizer_step_post_hook(lambda *_: seen.append("last")),
    ]
    try:
        with torch.autograd.profiler.profile() as profile:
            opt.step(closure=None)
            opt.zero_grad()
    finally:
        for handle in handles:
            handle.remove()
    arguments = (opt,), {"closure": None}
    assert seen == ["first", ("pre", *arguments), ("post", *arguments), "last"]
    names = [e.name for e in profile.function_events]
    assert names.count(f"Optimizer.step#{ours.__name__}.step") == 1
    assert names.count(f"Optimizer.zero_grad#{ours.__name__}.zero_grad") == 1


@pytest.mark.parametrize("watcher", ["before", "after", "before any", "after any", "profiler"])
def test_whoever_watches_alone_sees_a_step(watcher):
    seen = []
    opt = layerlr.SGD(weights())

    def note(*_):
        seen.append(watcher)

    if watcher == "profiler":
        with torch.profiler.profile() as profile:
            opt.step()
        assert [e.name for e in profile.events()].count("Optimizer.step#SGD.step") == 1
        return
    register = {
        "before": opt.register_step_pre_hook,
        "after": opt.register_step_post_hook,
        "before any": register_optimizer_step_pre_hook,
        "after any": register_optimizer_step_post_hook,
    }
    handle = register[watcher](note)
    try:
        opt.step()
    finally:
        handle.remove()
    opt.step()
    assert seen == [watcher]


def test_a_step_that_nobody_watches_is_not_recorded(monkeypatch):
    opt = layerlr.SGD(weights(), lr=0.5)
    opened = []
    before = torch.autograd.profiler.record_function
    monkeypatch.setattr(
        torch.autograd.profiler, "record_function", lambda name: opened.append(name) or before(name)
    )
    opt.step()
    assert opened == []
    opt.register_step_pre_hook(lambda *_: None)
    opt.step()
    assert opened == ["Optimizer.step#SGD.step"]


@pytest.mark.parametrize("of", ["torch", "layerlr"])
def test_a_hook_that_the_closure_registers_runs_after_the_same_step(of):
    opt, seen = {"torch": torch.optim.SGD, "layerlr": layerlr.SGD}[of](weights(), lr=0.5), []

    def closure():
        if not seen:
            opt.register_step_post_hook(lambda o, args, kwargs: seen.append((args, kwargs)))

    opt.step(closure=closure)
    assert seen == [((opt,), {"closure": closure})]


def test_a_step_of_a_subclass_s_own():
    """Hooks run around it; with torch's classes a step that it calls runs them again."""
    seen = []

    class Own(layerlr.SGD):
        def step(self, closure=None):
            seen.append("own")
            return super().step(closure)

    opt = Own(weights())
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.step()
    assert seen[:2] == ["before", "own"]


def test_a_pre_hook_may_change_the_arguments():
    opt = layerlr.SGD(weights())
    opt.register_step_pre_hook(lambda o, args, kwargs: (args, {"closure": lambda: 41}))
    assert opt.step() == 41
    opt.register_step_pre_hook(lambda o, args, kwargs: 1)
    with pytest.raises(RuntimeError, match="must return None or a tuple of"):
        opt.step()


@each_class
def test_zero_grad(ours):
    params = weights()
    opt = ours(params)
    set_grads(params, 0)
    kept = [p.grad for p in params]
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is g and not g.any() for p, g in zip(params, kept, strict=True))
    opt.zero_grad()
    assert [p.grad for p in params] == [None] * 4


@each_class
def test_capturable_on_cpu_is_refused(ours):
    params = weights()
    opt = ours(params, capturable=True)
    set_grads(params, 0)
    before = photograph(opt)
    with pytest.raises(RuntimeError, match=r"If capturable=True, .* must be on supported devices"):
        opt.step()
    assert same(photograph(opt), before)


@each_variant
@each_backend
def test_clipping_and_accumulation(variant, backend):
    results = []
    for build, options in ((make, {"backend": backend}), (make_twin, {})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        data = torch.randn(12, 2, 5, dtype=torch.float64)
        opt = build(variant, model.parameters(), **options)
        for number, batch in enumerate(data):
            model(batch).pow(2).sum().backward()
            if number % 3 == 2:
                norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                assert norm > 0.5
                opt.step()
                opt.zero_grad()
        results.append(list(model.parameters()))
    assert_close(*results)


@each_variant
@each_rule
@each_backend
@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler_skips_overflows(variant, rule, backend, fused):
    if variant.startswith("rmsprop") and fused:
        pytest.skip(reason="torch's RMSprop has no fused either")
    flags = {} if fused is None else {"fused": fused}
    scaled, plain = weights(), weights()
    opt = make(variant, scaled, rule, backend=backend, **flags)
    oracle = make(variant, plain, rule, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    for step in range(6):
        set_grads(plain, step)
        losses = [(p * q.grad).sum() for p, q in zip(scaled, plain, strict=True)]
        if step in (0, 3):  # the very first step and a later one overflow in one parameter
            losses[1] = losses[1] * torch.inf
        scaler.scale(sum(losses)).backward()
        before = photograph(opt), scaler.get_scale()
        if step % 2:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        if step in (0, 3):
            assert scaler.get_scale() == before[1] / 2
            assert same(photograph(opt), before[0])
        else:
            oracle.step()
            now, wanted = photograph(opt), photograph(oracle)
            assert same(now["weights"], wanted["weights"]) and same(now["state"], wanted["state"])


@each_variant
@each_rule
def test_differentiable(variant, rule):
    """Derivatives of new weights and state by old weights, gradient, lr and old state."""
    keys = [k for k in make(variant, [weights()[0]]).state.popitem()[1] if k != "step"]
    generator = torch.Generator().manual_seed(1)
    p, g, *state = 0.5 + torch.rand(2 + len(keys), 3, 2, generator=generator, dtype=torch.float64)
    squares = ("sum", "square_avg", "exp_avg_sq", "max_exp_avg_sq")
    state = [v + 3 * (k in squares) for k, v in zip(keys, state, strict=True)]
    lr = torch.tensor(0.3, dtype=torch.float64)

    def step(p, g, lr, *state):
        p = p.clone()
        p.grad = g
        opt = make(variant, [p], rule, lr=lr, differentiable=True)
        opt.state[p].update({k: v.clone() for k, v in zip(keys, state, strict=True)})
        opt.state[p]["step"] = torch.tensor(2.0)
        opt.step()
        return p, *(opt.state[p][k] for k in keys)

    assert torch.autograd.gradcheck(step, [v.requires_grad_() for v in (p, g, lr, *state)])


@each_class
@each_backend
def test_inference_mode(ours, backend):
    runs = []
    for mode in (torch.inference_mode, torch.enable_grad):
        params = weights()
        opt = ours(params, backend=backend)
        set_grads(params, 0)
        with mode():
            opt.step()
        train(opt, params, 2, seed=1)
        runs.append(photograph(opt))
    assert same(*runs)


@pytest.mark.parametrize(
    "variant", ["momentum", "amom", "adagrad", "rmsprop", "adam", "adamw", "lion"]
)
@pytest.mark.parametrize("shape", [(1, 4), (3, 4)])  # the first would broadcast
@each_backend
def test_a_changed_shape_is_refused_before_any_change(variant, shape, backend):
    params = weights()
    opt = make(variant, named(params), backend=backend)
    train(opt, params, 1)
    params[2].data = torch.zeros(shape, dtype=torch.float64)
    before = photograph(opt)
    for renew in (False, True):  # with the gradient of the old shape, then with a new one
        if renew:
            set_grads(params, 1)
        with pytest.raises(RuntimeError, match=r"'layer1.weight'"):
            opt.step()
        assert same(photograph(opt), before)


@pytest.mark.parametrize("ours", CLASSES, ids=lambda c: c.__name__)
def test_fused_wants_real_floating_point_as_in_torch(ours):
    def step(cls):
        p = Parameter(torch.ones(2, 3, dtype=torch.complex128))
        p.grad = torch.ones_like(p)
        cls([p], fused=True).step()

    if "fused" not in inspect.signature(ours).parameters:
        pytest.skip(reason="torch's RMSprop has no fused either")
    theirs = outcome(lambda: step(IN_TORCH.get(ours, torch.optim.SGD)))
    assert theirs[1].startswith("`fused=True` requires all the params to be floating point")
    kind, words = outcome(lambda: step(ours))
    # the list of devices differs between torch's own optimizers in 2.11
    assert kind is theirs[0] and words.split(": [")[0] == theirs[1].split(": [")[0]
    assert words.endswith("but torch.complex128 and cpu")


@each_class
def test_uninitialized_parameters_are_refused_as_torch_s_adagrad_does(ours):
    # state is made in the constructor, there and here
    for cls in (ours, torch.optim.Adagrad):
        kind, words = outcome(lambda c=cls: c(nn.LazyLinear(3).parameters()))
        assert kind is ValueError and "Attempted to use an uninitialized parameter" in words


def test_one_optimizer_is_compiled_after_another():
    torch._dynamo.reset()
    for _ in range(3):
        ours, eager = ([Parameter(torch.ones(2, 3))] for _ in range(2))
        opt, twin = (layerlr.SGD(p, lr=0.1, rule="lars") for p in (ours, eager))
        step = torch.compile(opt.step, backend="eager", fullgraph=True)
        for seed in range(2):
            set_grads(ours, seed)
            set_grads(eager, seed)
            step()
            twin.step()
        assert same(ours, eager)
