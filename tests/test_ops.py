"""The registered op: opcheck, and whole steps under torch.compile."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import layerlr
from layerlr.backends import COLUMNS

pytestmark = pytest.mark.full("compiled steps")

CASES = [
    (layerlr.SGD, dict(lr=0.1, rule="singh")),
    (layerlr.SGD, dict(lr=0.1, momentum=0.9, rule="layca", layers="module", adapt="all")),
    (layerlr.RMSprop, dict(lr=0.01, rule="lars", weight_decay=0.1)),
    (layerlr.AdamW, dict(lr=0.01, rule="lamb")),
    (layerlr.Adam, dict(lr=0.01)),
]


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))


def backward(model, x):
    model.zero_grad()
    model(x).pow(2).sum().backward()


@pytest.mark.parametrize("cls, kwargs", CASES)
def test_compiled_step_equals_eager(cls, kwargs):
    torch._dynamo.reset()
    eager, compiled = make_model(), make_model()
    one, two = (
        cls([{"params": list(model.named_parameters()), "split": 2}], **kwargs)
        for model in (eager, compiled)
    )

    @torch.compile(fullgraph=True, backend="eager")
    def step():
        two.step()

    for k in range(4):
        x = torch.randn(3, 4)
        for model in (eager, compiled):
            backward(model, x)
        if k == 2:  # a schedule
            for opt in (one, two):
                opt.param_groups[0]["lr"] *= 0.5
        if k == 3:  # a parameter that stays out
            eager[0].bias.grad = compiled[0].bias.grad = None
        one.step()
        step()
        for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
            assert torch.equal(p, q)
            for key, value in one.state[p].items():
                assert torch.equal(value, two.state[q][key]), key
    mine, theirs = one.layer_stats(), two.layer_stats()
    assert mine.pop("names") == theirs.pop("names")
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]), key


def halve(step, opt):
    opt.param_groups[0]["lr"] *= 0.5


def plateau(step, opt):
    """Assigns floats."""
    if step == 0:
        opt.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5)
    opt.plateau.step(1.0)


def everything(step, opt):
    """What schedulers of lr, of cycles and of weight decay set."""
    for group in opt.param_groups:
        group["lr"] *= 0.9
        group["weight_decay"] = 0.01 * step
        group["maximize"] = step == 3
        if "betas" in group:
            group["betas"] = 0.9 - 0.1 * step, 0.99 - 0.01 * step
        elif group.get("momentum"):
            group["momentum"] = 0.9 - 0.1 * step


@pytest.fixture
def no_recompiles():
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def pair(cls, kwargs, **more):
    """Two optimizers over equal models, of two param groups each."""
    models = make_model(), make_model()
    named = [list(m.named_parameters()) for m in models]
    groups = [[{"params": n[:2]}, {"params": n[2:]}] for n in named]
    return models, [cls(g, **{**kwargs, **more}) for g in groups]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("change", [halve, plateau, everything], ids=lambda f: f.__name__)
@pytest.mark.parametrize("cls, kwargs", CASES, ids=lambda x: getattr(x, "__name__", ""))
def test_numbers_do_not_recompile(cls, kwargs, change, backend, no_recompiles):
    """One graph without a break, which reads the numbers of the moment."""
    torch._dynamo.reset()
    models, (one, two) = pair(cls, kwargs)
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(two.step, fullgraph=True, backend=counter)
    for k in range(5):
        x = torch.randn(3, 4)
        for model in models:
            backward(model, x)
        for opt in (one, two):
            change(k, opt)
        one.step()
        step()
        assert all(map(torch.equal, *(m.parameters() for m in models))), k
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_training_step(backend, no_recompiles):
    """Forward, backward and step; torch breaks the graph at backward, and nothing else does."""
    torch._dynamo.reset()
    models, (one, two) = pair(layerlr.AdamW, dict(lr=0.01, rule="lamb"))

    def train(model, opt, x):
        for p in model.parameters():  # torch does not look into zero_grad()
            p.grad = None
        loss = model(x).pow(2).sum()
        loss.backward()
        opt.step()
        return loss.detach()

    compiled = torch.compile(train, backend=backend)
    torch._dynamo.utils.counters.clear()
    for k in range(5):
        x = torch.randn(3, 4)
        # gradients of compiled models differ in their last bits
        torch.testing.assert_close(train(models[0], one, x), compiled(models[1], two, x))
        for opt in (one, two):
            everything(k, opt)
    (reason,) = torch._dynamo.utils.counters["graph_break"]
    assert "backward" in reason


def test_numbers_set_within_the_graph():
    """Then it is broken, since the op would read what was there before."""
    torch._dynamo.reset()
    models, (one, two) = pair(layerlr.SGD, dict(lr=0.1, rule="singh"))

    def train(opt, lr):
        for group in opt.param_groups:
            group["lr"] = lr
        opt.step()

    compiled = torch.compile(train, backend="eager")
    for lr in (0.1, 0.2, 0.3):
        x = torch.randn(3, 4)
        for model in models:
            backward(model, x)
        train(one, lr)
        compiled(two, lr)
        assert all(map(torch.equal, *(m.parameters() for m in models)))


def test_tensor_lr_set_within_the_graph():
    torch._dynamo.reset()
    rates = torch.tensor(0.1), torch.tensor(0.1)
    models = make_model(), make_model()
    one, two = (layerlr.SGD(m.parameters(), lr=r) for m, r in zip(models, rates, strict=True))

    def train(opt, rate, factor):
        rate.mul_(factor)
        opt.step()

    compiled = torch.compile(train, backend="aot_eager", fullgraph=True)
    for k in range(3):
        for model in models:
            backward(model, torch.ones(3, 4))
        train(one, rates[0], torch.tensor(0.5 + k))
        compiled(two, rates[1], torch.tensor(0.5 + k))
        assert all(map(torch.equal, *(m.parameters() for m in models)))


@pytest.mark.parametrize(
    "cls, flag",
    [
        (layerlr.SGD, {"nesterov": True}),
        (layerlr.SGD, {"rule": "layca"}),
        (layerlr.SGD, {"on_nonfinite": "propagate"}),
        (layerlr.RMSprop, {"centered": True}),
        (layerlr.Adam, {"decoupled_weight_decay": True}),
        (layerlr.Adam, {"amsgrad": True}),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else x.__name__,
)
def test_flags_may_change(cls, flag):
    torch._dynamo.reset()
    momentum = {} if cls is layerlr.Adam else {"momentum": 0.9}
    models, (one, two) = pair(cls, dict(lr=0.01, weight_decay=0.1, rule="singh", **momentum))
    step = torch.compile(two.step, backend="eager")
    for k in range(4):
        x = torch.randn(3, 4)
        for model in models:
            backward(model, x)
        if k == 2:
            for opt in (one, two):
                opt.param_groups[1].update(flag)
        one.step()
        step()
        assert all(map(torch.equal, *(m.parameters() for m in models))), k


@pytest.mark.parametrize("cls", [layerlr.SGD, layerlr.RMSprop])
def test_momentum_that_comes_and_goes(cls):
    """0 means another step: it comes with a new graph, and goes with an error before any change."""
    torch._dynamo.reset()
    models, (one, two) = pair(cls, dict(lr=0.01))
    step = torch.compile(two.step, backend="eager")
    for momentum in (0.0, 0.9, 0.8, 0.0, 0.0, 0.9):
        x = torch.randn(3, 4)
        for model in models:
            backward(model, x)
        before = two.param_groups[1]["momentum"]
        for opt in (one, two):
            opt.param_groups[1]["momentum"] = momentum
        one.step()
        if momentum == 0.0 and before:
            old = [p.clone() for p in models[1].parameters()]
            with pytest.raises(RuntimeError, match="param group 1 wants another step"):
                step()
            assert all(map(torch.equal, old, models[1].parameters()))
            two.step()
        else:
            step()
        assert all(map(torch.equal, *(m.parameters() for m in models))), momentum


def test_copies_have_numbers_of_their_own():
    torch._dynamo.reset()
    model = make_model()
    opt = layerlr.SGD(model.parameters(), lr=0.1)
    other = copy.deepcopy(opt)
    opt.param_groups[0]["lr"] = 0.7
    assert torch.ops.layerlr.numbers(opt._handle)[0, 0] == 0.7
    assert torch.ops.layerlr.numbers(other._handle)[0, 0] == 0.1
    handle = opt._handle
    opt.load_state_dict(other.state_dict())
    assert opt._handle == handle
    assert torch.ops.layerlr.numbers(handle)[0, 0] == 0.1
    with pytest.raises(KeyError):  # nothing is kept alive
        handle = other._handle
        del other
        torch.ops.layerlr.numbers(handle)


def test_group_that_changed_breaks_the_graph_and_goes_on():
    torch._dynamo.reset()
    eager, compiled = make_model(), make_model()
    one = layerlr.SGD(eager.parameters(), lr=0.1, rule="singh")
    two = layerlr.SGD(compiled.parameters(), lr=0.1, rule="singh")
    step = torch.compile(two.step, backend="eager")
    for rule in ("singh", "lars", "layca"):
        one.param_groups[0]["rule"] = two.param_groups[0]["rule"] = rule
        x = torch.randn(3, 4)
        for model in (eager, compiled):
            backward(model, x)
        one.step()
        step()
        assert all(map(torch.equal, eager.parameters(), compiled.parameters()))


def test_tensor_lr_does_not_recompile():
    torch._dynamo.reset()
    model = make_model()
    lr = torch.tensor(0.1)
    opt = layerlr.SGD(model.parameters(), lr=lr, rule="singh")
    backward(model, torch.randn(3, 4))
    counter = CompileCounter()
    step = torch.compile(opt.step, fullgraph=True, backend=counter)
    for value in (0.1, 0.05, 0.01, 0.02):
        lr.fill_(value)
        step()
    assert counter.frame_count == 1


def test_compiled_step_falls_back_to_eager_off_the_cpu_engine():
    torch._dynamo.reset()
    eager, compiled = make_model(), make_model()
    one = layerlr.SGD(eager.parameters(), lr=0.1, rule="layca", backend="reference")
    two = layerlr.SGD(compiled.parameters(), lr=0.1, rule="layca", backend="reference")
    step = torch.compile(two.step, backend="eager")
    x = torch.randn(3, 4)
    for model in (eager, compiled):
        backward(model, x)
    one.step()
    step()
    assert all(map(torch.equal, eager.parameters(), compiled.parameters()))


def arguments(**changes):
    params = [torch.randn(4, 3), torch.randn(5)]
    values = dict(
        params=params,
        grads=[torch.randn_like(p) for p in params],
        state=[torch.zeros_like(p) for p in params],
        steps=[torch.zeros(()) for _ in params],
        kept=[torch.zeros(1, dtype=torch.float64)],
        stats=torch.zeros(2, len(COLUMNS), dtype=torch.float64),
        numbers=torch.tensor([0.1, 0, 0, 1, 1, 0.9, 0, 0, 0, 0], dtype=torch.float64),
        lr=None,
        grad_scale=None,
        found_inf=None,
        direction="momentum",
        rule="layca",
        spans=[0, 0, 4, 0, 1, 0, 5, 1],
        ruled=[1, 0],
        leaders=[0, 0, 0],
        lr_scale=[1.0, 1.0],
        rule_hyper=[1e-6],
    )
    values.update(changes)
    return tuple(values.values())


def test_opcheck():
    torch.library.opcheck(torch.ops.layerlr.step_, arguments())
    tensors = dict.fromkeys(("lr", "grad_scale"), torch.ones(())) | {"found_inf": torch.zeros(())}
    torch.library.opcheck(torch.ops.layerlr.step_, arguments(**tensors))
    opt = layerlr.SGD(make_model().parameters())
    # of another answer at every call there is nothing to compare
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.layerlr.numbers, (opt._handle,), test_utils=checks)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(direction="nadam"), "unknown direction 'nadam', known are sgd"),
        (dict(rule="lion"), "unknown rule 'lion', known are plain"),
        (dict(grads=[torch.ones(4, 3), torch.ones(6)]), "gradient 1 does not fit"),
        (dict(state=[torch.ones(4, 3), torch.ones(5).double()]), "state 0 of parameter 1"),
        (dict(spans=[0, 0, 5, 0, 1, 0, 5, 1]), None),
        (dict(spans=[0, 0, 4, 2, 1, 0, 5, 1]), None),
        (dict(spans=[2, 0, 4, 0, 1, 0, 5, 1]), None),
        (dict(leaders=[0, 1, 0]), None),
        (dict(leaders=[0, 0, 1]), None),
        (dict(numbers=torch.zeros(5, dtype=torch.float64)), None),
        (dict(numbers=torch.zeros(10)), None),
        (dict(stats=torch.zeros(1, len(COLUMNS), dtype=torch.float64)), None),
    ],
)
def test_op_refuses_what_does_not_fit(change, message):
    before = arguments(**change)
    after = copy.deepcopy(before)
    with pytest.raises((RuntimeError, IndexError), match=message):
        torch.ops.layerlr.step_(*after)
    for x, y in zip(before[0], after[0], strict=True):
        assert torch.equal(x, y)
