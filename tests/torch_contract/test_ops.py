"""The registered op: opcheck, and whole steps under torch.compile."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import layerlr

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
    """0 means another step, which has another state: it comes with a new graph, and goes."""
    torch._dynamo.reset()
    models, (one, two) = pair(cls, dict(lr=0.01))
    step = torch.compile(two.step, backend="eager")
    for momentum in (0.0, 0.9, 0.8, 0.0, 0.0, 0.9):
        x = torch.randn(3, 4)
        for model in models:
            backward(model, x)
        for opt in (one, two):
            opt.param_groups[1]["momentum"] = momentum
        one.step()
        step()
        assert all(map(torch.equal, *(m.parameters() for m in models))), momentum


def test_copies_have_handles_of_their_own():
    torch._dynamo.reset()
    model = make_model()
    opt = layerlr.SGD(model.parameters(), lr=0.1)
    other = copy.deepcopy(opt)
    handle = opt.handle
    assert other.handle != handle
    opt.load_state_dict(other.state_dict())
    assert opt.handle == handle
    with pytest.raises(KeyError):  # nothing is kept alive
        handle = other.handle
        del other
        torch.ops.layerlr.step([], [], [], [], None, None, [], [], handle)


def test_group_that_changed_goes_on():
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


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_an_lr_that_becomes_a_tensor_and_a_number_again(backend):
    torch._dynamo.reset()
    models = make_model(), make_model()
    one, two = (
        layerlr.SGD([{"params": [p]} for p in m.parameters()], lr=0.1, rule="layca") for m in models
    )
    step = torch.compile(two.step, backend=backend, fullgraph=True)
    for lr in (0.1, torch.tensor(0.2), torch.tensor(0.3), 0.4):
        for model, opt in zip(models, (one, two), strict=True):
            opt.param_groups[1]["lr"] = lr
            backward(model, torch.ones(3, 4))
        one.step()
        step()
        assert all(map(torch.equal, *(m.parameters() for m in models))), lr


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(backend="reference"),
        dict(max_grad_norm=0.1),
        dict(precision="master", dtype=torch.bfloat16),
        dict(precision="stochastic", dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_every_engine_and_option_compiles(kwargs, backend):
    torch._dynamo.reset()
    kwargs = dict(kwargs)
    dtype = kwargs.pop("dtype", torch.float32)
    models = make_model().to(dtype), make_model().to(dtype)
    torch.manual_seed(3)
    one, two = (layerlr.SGD(m.parameters(), lr=0.1, rule="layca", **kwargs) for m in models)
    step = torch.compile(two.step, backend=backend, fullgraph=True)
    for k in range(3):
        for model in models:
            backward(model, torch.full((3, 4), 1.0 + k, dtype=dtype))
        one.step()
        step()
        assert all(map(torch.equal, *(m.parameters() for m in models))), k


def operands(opt):
    """What the op is given of an optimizer, whose parameters all have a gradient."""
    params = [p for group in opt.param_groups for p in group["params"]]
    state = [x for p in params for x in opt.state[p].values()]
    grads = [p.grad for p in params]
    return params, grads, state, [], None, None, list(range(len(params))), [], opt.handle


def clones(args):
    return [[x.detach().clone() for x in a] if isinstance(a, list) else a for a in args[:4]]


def test_opcheck():
    model = make_model()
    opt = layerlr.SGD(model.parameters(), lr=0.1, momentum=0.9, rule="layca")
    backward(model, torch.ones(3, 4))
    params, grads, state, *rest = operands(opt)
    detached = [p.detach() for p in params], [g.clone() for g in grads], state
    torch.library.opcheck(torch.ops.layerlr.step, (*detached, *rest))
    scaled = [*rest[:1], torch.ones(()), torch.zeros(()), *rest[3:]]
    torch.library.opcheck(torch.ops.layerlr.step, (*detached, *scaled))


@pytest.mark.parametrize("cls, kwargs", CASES, ids=lambda x: getattr(x, "__name__", ""))
def test_the_op_on_copies(cls, kwargs):
    """As where a compiler has taken the side effects out: values go in, and come out."""
    models = make_model(), make_model()
    one, two = (cls(list(m.named_parameters()), **kwargs) for m in models)
    for k in range(3):
        for model in models:
            backward(model, torch.full((3, 4), 1.0 + k))
        args = operands(two)
        copies = clones(args)
        with torch.no_grad():
            for p, q in zip(models[0].parameters(), copies[0], strict=True):
                p.mul_(1.5)  # what a graph did to its copies before the step
                q.mul_(1.5)
        for p in models[1].parameters():
            p.grad = None  # nor does the live parameter have the gradient
        one.step()
        torch.ops.layerlr.step(*copies, *args[4:])
        assert all(p.grad is None for p in models[1].parameters())
        for mine, theirs in zip(operands(one)[0], copies[0], strict=True):
            assert torch.equal(mine, theirs)
        for mine, theirs in zip(operands(one)[2], copies[2], strict=True):
            assert torch.equal(mine, theirs)
        assert all(map(torch.equal, *(m.parameters() for m in models)))


def test_the_op_refuses_what_does_not_fit():
    """In the words of the eager step, or because the lists are not the optimizer's."""
    model = make_model()
    opt = layerlr.SGD(model.parameters(), lr=0.1, momentum=0.9, rule="layca")
    backward(model, torch.ones(3, 4))
    before = [p.detach().clone() for p in model.parameters()]
    args = operands(opt)
    for change in (
        {0: args[0][:-1]},
        {1: args[1][:-1]},
        {1: [torch.ones(7) for _ in args[1]]},
        {2: args[2][:-1]},
        {6: args[6][:-1]},
    ):
        changed = [change.get(k, arg) for k, arg in enumerate(args)]
        with pytest.raises((RuntimeError, ValueError)), torch.no_grad():
            torch.ops.layerlr.step(*changed)
        assert all(map(torch.equal, before, model.parameters())), change.keys()


@pytest.mark.parametrize("cls, rule", [(layerlr.SGD, "singh"), (layerlr.AdamW, "lamb")])
@pytest.mark.filterwarnings("error::UserWarning")
def test_made_in_a_compiled_function(cls, rule):
    def train(w):
        w = w.detach().clone().requires_grad_(True)
        opt = cls([w], lr=0.1, rule=rule)
        opt.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
        w.grad = torch.ones_like(w)
        opt.step()
        return w.detach(), opt.layer_stats()["lr"]

    torch._dynamo.reset()
    start = torch.arange(1.0, 13.0).view(3, 4)
    for x, y in zip(train(start), torch.compile(train, backend="eager")(start), strict=True):
        assert torch.equal(x, y)
