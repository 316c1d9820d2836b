"""The registered op: opcheck, and whole steps under torch.compile."""

import copy

import pytest
import torch

import layerlr
from layerlr.backends import COLUMNS

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
    counter = torch._dynamo.testing.CompileCounter()
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
        lr=torch.tensor(0.1, dtype=torch.float64),
        direction="momentum",
        rule="layca",
        spans=[0, 0, 4, 0, 1, 0, 5, 1],
        ruled=[1, 0],
        leaders=[0, 0, 0],
        lr_scale=[1.0, 1.0],
        rule_hyper=[1e-6],
        direction_hyper=[0.9, 0.0],
        weight_decay=0.0,
        decoupled=False,
        sign=torch.ones((), dtype=torch.float64),
        found_inf=torch.zeros((), dtype=torch.float64),
        skip=True,
    )
    values.update(changes)
    return tuple(values.values())


def test_opcheck():
    torch.library.opcheck(torch.ops.layerlr.step_, arguments())


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
