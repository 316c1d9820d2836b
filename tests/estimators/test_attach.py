"""What attach promises: which batch is looked at, what stays as it is, what is let go."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from cases import copies, same_bits
from torch import nn

import layerlr
from layerlr.rules import BackMatching, Curvature

FISHER = Curvature("fisher", likelihood="gaussian", refresh=2)
RULES = [BackMatching(refresh=2), BackMatching("probe", refresh=2), FISHER]
every_rule = pytest.mark.parametrize("rule", RULES, ids=["structural", "probe", "fisher"])


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def make(model, rule="backmatching", lr=0.05, **kwargs):
    return layerlr.SGD(model.parameters(), lr=lr, rule=rule, **kwargs)


def data(seed=0, n=4):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def backward(model, x):
    model.zero_grad()
    model(x).square().mean().backward()


def rates(opt):
    return torch.cat([opt.state[p]["rate"] for g in opt.param_groups for p in g["params"]])


def rates_for(x, rule="backmatching", seed=0):
    """Of a first step after that batch."""
    model = mlp(seed)
    opt = make(model, rule)
    opt.attach(model)
    backward(model, x)
    opt.step()
    return rates(opt)


def hooks(model):
    return list(model._forward_pre_hooks.values())


# -- errors --------------------------------------------------------------------------------------


@every_rule
def test_the_model_is_missing(rule):
    model = mlp()
    opt = make(model, rule)
    backward(model, data())
    before = copies(model.parameters())
    with pytest.raises(RuntimeError, match=r"call optimizer\.attach\(model\) before the first"):
        opt.step()
    assert same_bits(before, model.parameters())
    assert opt.param_groups[0].get("estimated", 0) == 0
    opt.attach(model)
    backward(model, data())
    opt.step()
    assert opt.param_groups[0]["estimated"] == 1


def test_a_step_without_an_estimate_needs_no_model():
    model = mlp()
    opt = make(model, BackMatching(refresh=3))
    opt.attach(model)
    for _ in range(3):
        backward(model, data())
        opt.step()
        opt.detach()
    with pytest.raises(RuntimeError, match="attach"):
        opt.step()


@pytest.mark.parametrize("wrong", [None, 3, nn.Linear, [nn.Linear(1, 1)], lambda x: x])
def test_anything_but_a_module_is_refused(wrong):
    model = mlp()
    opt = make(model)
    opt.attach(model)
    with pytest.raises(TypeError, match=r"attach wants a torch\.nn\.Module, got"):
        opt.attach(wrong)
    backward(model, data())
    opt.step()  # the model is still there


@every_rule
@pytest.mark.parametrize("guard", [None, torch.no_grad, torch.inference_mode])
def test_the_model_has_not_run(rule, guard):
    model = mlp()
    opt = make(model, rule)
    backward(model, data())
    opt.attach(model)
    if guard is not None:
        with guard():
            model(data())
    before = copies(model.parameters())
    with pytest.raises(RuntimeError, match="the attached model has not run yet: call the model"):
        opt.step()
    assert same_bits(before, model.parameters())


# -- which batch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES[:2], ids=["structural", "probe"])
def test_evaluation_is_not_remembered(rule):
    model = mlp()
    opt = make(model, rule)
    opt.attach(model)
    backward(model, data(0))
    with torch.no_grad():
        model(data(1, n=7))
    opt.step()
    assert torch.equal(rates(opt), rates_for(data(0), rule))
    assert not torch.equal(rates(opt), rates_for(data(1, n=7), rule))


def test_the_last_of_several_batches_counts():
    model = mlp()
    opt = make(model)
    opt.attach(model)
    for seed in (0, 1):
        model(data(seed)).square().mean().backward()
    opt.step()
    assert torch.equal(rates(opt), rates_for(data(1)))


def test_the_batch_is_held_by_reference():
    model, x = mlp(), data(0)
    opt = make(model)
    opt.attach(model)
    backward(model, x)
    x.copy_(data(1))
    opt.step()
    assert torch.equal(rates(opt), rates_for(data(1)))


@every_rule
def test_keyword_arguments(rule):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x, *, gain=1.0, shift=None):
            return gain * self.body(x if shift is None else x + shift)

    found = []
    for shift in (None, torch.ones(3)):
        model = Net()
        opt = make(model, rule)
        opt.attach(model)
        x = data() if shift is None else data() - shift
        model(gain=2.0, x=x, shift=shift).square().mean().backward()
        opt.step()
        found.append(rates(opt))
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)
    if rule is RULES[0]:  # relative to the last layer the gain is nothing
        torch.testing.assert_close(found[0], rates_for(data(), rule), rtol=1e-4, atol=0)


def test_the_pass_that_looks_is_not_remembered():
    model = mlp()
    opt = make(model, BackMatching("probe", refresh=1))
    opt.attach(model)
    x = data()
    backward(model, x)
    seen = opt._estimation.replay._seen
    assert seen[0][0] is x and seen[1] == {}
    opt.step()
    assert opt._estimation.replay._seen is seen


# -- what stays as it is -------------------------------------------------------------------------


class Noisy(nn.Module):
    """Dropout and running statistics, of torch and by hand: assigned, not written in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(8, 2)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.seen = self.seen + 1
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


@every_rule
def test_buffers_and_random_numbers_stay(rule):
    torch.manual_seed(0)
    model = Noisy()
    opt = make(model, rule)
    opt.attach(model)
    for step in range(3):
        backward(model, data(step, n=8))
        grads = [p.grad.clone() for p in model.parameters()]
        objects = {name: id(b) for name, b in model.named_buffers()}
        values = [b.clone() for b in model.buffers()]
        rng = torch.get_rng_state()
        opt.step()
        assert torch.equal(rng, torch.get_rng_state())
        assert same_bits(values, model.buffers())
        assert objects == {name: id(b) for name, b in model.named_buffers()}
        assert list(model._buffers) == ["seen", "nothing"]
        assert same_bits(grads, [p.grad for p in model.parameters()])
    assert model.seen == 3 and model.norm.num_batches_tracked == 3


@every_rule
def test_a_run_with_dropout_draws_what_a_plain_one_draws(rule):
    """At a rate of learning of 0 the losses are those of torch's optimizer."""
    runs = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = Noisy()
        plain = torch.optim.SGD(model.parameters(), lr=0.0)
        opt = make(model, rule, lr=0.0) if ours else plain
        if ours:
            opt.attach(model)
        losses = []
        for step in range(4):
            opt.zero_grad()
            loss = model(data(step, n=8)).square().mean()
            loss.backward()
            opt.step()
            losses.append(loss.item())
        model.eval()
        runs.append((losses, model(data()).detach()))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])


def test_the_pass_has_the_dropout_of_the_real_one():
    """Two optimizers that differ in what was drawn between forward pass and step."""
    found = []
    for draws in (0, 5):
        torch.manual_seed(0)
        model = Noisy()
        opt = make(model, BackMatching("probe"))
        opt.attach(model)
        backward(model, data(n=8))
        torch.rand(draws)
        opt.step()
        found.append(rates(opt))
    assert torch.equal(*found)


def test_an_error_in_the_pass_leaves_all_as_it_was():
    class Moody(Noisy):
        fails = False

        def forward(self, x):
            y = super().forward(x)
            if self.fails:
                raise KeyError("no")
            return y

    torch.manual_seed(0)
    model = Moody()
    opt = make(model, BackMatching("probe"))
    opt.attach(model)
    backward(model, data(n=8))
    model.fails = True
    values = [b.clone() for b in [*model.buffers(), *model.parameters()]]
    rng = torch.get_rng_state()
    with pytest.raises(KeyError):
        opt.step()
    assert same_bits(values, [*model.buffers(), *model.parameters()])
    assert torch.equal(rng, torch.get_rng_state()) and torch.is_grad_enabled()
    model.fails = False
    x = data(1, n=8)
    backward(model, x)
    assert opt._estimation.replay._seen[0][0] is x  # it watches on
    opt.step()


# -- letting go ----------------------------------------------------------------------------------


def test_one_hook_however_often():
    model, other = mlp(), mlp()
    opt = make(model)
    opt.detach()
    opt.attach(model)
    opt.attach(model)
    assert len(hooks(model)) == 1
    opt.attach(other)
    assert not hooks(model) and len(hooks(other)) == 1
    opt.detach()
    opt.detach()
    assert not hooks(other) and not other._forward_pre_hooks_with_kwargs


def test_two_optimizers_watch_one_model():
    model = mlp()
    first = layerlr.SGD(model[0].parameters(), lr=0.05, rule="backmatching")
    second = layerlr.SGD(model[2].parameters(), lr=0.05, rule="backmatching")
    for opt in (first, second):
        opt.attach(model)
    backward(model, data())
    for opt in (first, second):
        opt.step()
        assert rates(opt).log().mean().item() == pytest.approx(0.0, abs=1e-9)
    first.detach()
    assert len(hooks(model)) == 1


@pytest.mark.parametrize("way", ["detach", "delete", "attach another"])
@every_rule
def test_batch_and_model_are_released(rule, way):
    model, x = mlp(), data()
    opt = make(model, rule)
    opt.attach(model)
    backward(model, x)
    opt.step()
    batch, whole, x = weakref.ref(x), weakref.ref(model), None
    assert batch() is not None
    if way == "delete":
        opt = None
    elif way == "detach":
        opt.detach()
    else:
        opt.attach(mlp())
    gc.collect()
    assert batch() is None
    assert not hooks(model)
    model = None
    gc.collect()
    assert whole() is None


def test_only_the_last_batch_is_held():
    model, x = mlp(), data()
    opt = make(model)
    opt.attach(model)
    backward(model, x)
    first, x = weakref.ref(x), None
    assert first() is not None
    backward(model, data(1))
    gc.collect()
    assert first() is None


# -- copies --------------------------------------------------------------------------------------


def reload(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda v: pickle.loads(pickle.dumps(v))}
ways = pytest.mark.parametrize("way", [*WAYS.values(), reload], ids=[*WAYS, "torch.save"])


@ways
def test_a_copy_of_the_model_is_not_watched(way):
    model, x = mlp(), data()
    opt = make(model)
    opt.attach(model)
    backward(model, x)
    other = way(model)  # as of an average of the weights
    assert same_bits(model.parameters(), other.parameters())
    assert all(hook.replay is None for hook in hooks(other))
    other(data(1))
    assert opt._estimation.replay._seen[0][0] is x
    opt.step()
    assert torch.equal(rates(opt), rates_for(x))


@ways
def test_a_copy_of_the_model_can_be_attached(way):
    model = mlp()
    make(model).attach(model)
    other = way(model)
    opt = make(other)
    opt.attach(other)
    x = data(2)
    backward(other, x)
    opt.step()
    assert torch.equal(rates(opt), rates_for(x))
    opt.detach()
    backward(other, x)


@ways
@every_rule
def test_a_copy_of_the_optimizer_has_no_model(way, rule):
    model = mlp()
    opt = make(model, rule)
    opt.attach(model)
    for step in range(2):
        backward(model, data(step))
        opt.step()
    other, moved = way((opt, model))
    assert other._estimation.replay is None and opt._estimation.replay is not None
    backward(moved, data(2))
    with pytest.raises(RuntimeError, match="attach"):
        other.step()
    other.attach(moved)
    for step in range(2, 5):
        for o, m in ((opt, model), (other, moved)):
            backward(m, data(step))
            o.step()
    assert same_bits(model.parameters(), moved.parameters())
    assert torch.equal(rates(opt), rates(other))


def test_loading_a_state_dict_keeps_the_model():
    model = mlp()
    opt = make(model)
    opt.attach(model)
    backward(model, data())
    opt.load_state_dict(opt.state_dict())
    opt.step()
    assert torch.equal(rates(opt), rates_for(data()))


def test_rules_that_do_not_look_take_no_notice():
    model = mlp()
    opt = make(model, "lars")
    opt.attach(model)
    backward(model, data())
    opt.step()
    assert "estimated" not in opt.param_groups[0]


@pytest.mark.parametrize("change", ["thawed", "cleared"])
def test_a_layer_that_comes_without_a_rate_is_given_one(change):
    """It stood still until the next estimate, up to nine steps."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    weight = model[0].weight
    weight.requires_grad_(change == "cleared")
    opt = layerlr.SGD(model.named_parameters(), lr=0.1, rule="backmatching")
    opt.attach(model)
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    for step in range(4):
        if step == 2:
            weight.requires_grad_(True)
            if change == "cleared":
                opt.state.clear()
        before = weight.detach().clone()
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        moves = step >= 2 or change == "cleared"
        assert torch.equal(weight, before) is not moves
