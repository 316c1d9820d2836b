"""Adam-mini: AdamW with one second moment a layer, as its paper has it, on every engine."""

from __future__ import annotations

import inspect

import cases
import pytest
import torch
import torch.distributed as dist
from cases import copies, random, same_bits, set_grads, state_of
from ranks import everywhere_the_same, full, run
from selection import NONE
from torch import tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import Parameter

import layerlr

F64 = torch.float64

#: decay, eps -> weights after each of two steps, from the paper's formulas:
#: betas (.5, .5), lr .1; v = 6.25 and 4.375, v_hat = 12.5 and 35/6, m_hat = (3, 4) and (1/3, 8/3)
WALK = {
    (0.0, 0.0): [[0.915147186258, 0.886862915010], [0.901345875071, 0.776452425515]],
    (0.5, 1.0): [[0.883855637237, 0.861807516315], [0.829902652218, 0.740635515247]],
}


@pytest.mark.parametrize(("decay", "eps"), WALK)
def test_two_steps_by_hand(engine, decay, eps):
    (w,) = engine.params([tensor([1.0, 1.0], dtype=F64)])
    options = {"lr": 0.1, "betas": (0.5, 0.5), "eps": eps, "weight_decay": decay}
    opt = layerlr.AdamMini([w], **options, backend=engine.backend)
    for g, expected in zip(([3.0, 4.0], [-1.0, 2.0]), WALK[decay, eps]):
        w.grad = tensor(g, dtype=F64).to(w)
        opt.step()
        wanted = tensor(expected, dtype=F64)
        torch.testing.assert_close(w.detach().cpu(), wanted, rtol=0, atol=1e-12)
    assert opt.state[w]["second_moment"].tolist() == pytest.approx([35 / 6], rel=1e-15)


class Twin:
    """As the paper's Algorithm 1, one layer for each block of rows."""

    def __init__(self, params, blocks, lr, betas, eps, weight_decay):
        self.params, self.blocks = params, blocks
        self.options = lr, betas, eps, weight_decay
        self.m = [torch.zeros_like(p) for p in params]
        self.v = [[0.0] * n for n in blocks]
        self.t = 0

    def step(self):
        lr, (b1, b2), eps, decay = self.options
        self.t += 1
        for p, m, v, n in zip(self.params, self.m, self.v, self.blocks, strict=True):
            m.mul_(b1).add_(p.grad, alpha=1 - b1)
            p.detach().mul_(1 - lr * decay)
            parts = zip(*(x.detach().chunk(n) for x in (p, p.grad, m)), strict=True)
            for k, (w, g, mean) in enumerate(parts):
                square = (g * g.conj()).abs().mean().item() / (1 + g.is_complex())
                v[k] = b2 * v[k] + (1 - b2) * square
                below = (v[k] / (1 - b2**self.t)) ** 0.5 + eps
                w.sub_(lr / (1 - b1**self.t) * mean / below)


@pytest.mark.quick(triton=NONE)
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_is_the_papers_algorithm(engine, dtype):
    """Heads, single rows and whole tensors; a layer's first gradient may be zero."""
    shapes, blocks = ((6, 4), (5, 3), (2, 2, 3), (7,)), (3, 5, 1, 1)
    values = [x.to(dtype) for x in random(shapes)]
    ours, theirs = engine.params(values), [Parameter(v.clone()) for v in values]
    options = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    groups = [{"params": [p], "split": n} for p, n in zip(ours, blocks, strict=True)]
    opt = layerlr.AdamMini(groups, **options, backend=engine.backend)
    twin = Twin(theirs, blocks, **options)
    for step in range(20):
        set_grads(theirs, step)
        if step < 2:
            theirs[1].grad[2] = 0.0
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad.to(p)
        opt.step()
        twin.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-12, atol=1e-13)
    for p, v in zip(ours, twin.v, strict=True):
        corrected = [x / (1 - 0.9**20) for x in v]
        assert opt.state[p]["second_moment"].tolist() == pytest.approx(corrected, rel=1e-12)


def test_several_parameters_are_one_layer(engine):
    """One second moment of both, in the state of the first, of whole layers' weights."""
    params = engine.params(random(((3, 4), (3,))))
    named = [("a.weight", params[0]), ("a.bias", params[1])]
    opt = layerlr.AdamMini(named, layers="module", backend=engine.backend)
    set_grads(params, 0)
    opt.step()
    square = sum((p.grad**2).sum().item() for p in params) / 15
    assert opt.state[params[0]]["second_moment"].item() == pytest.approx(square, rel=1e-14)
    assert opt.state[params[1]]["second_moment"].item() == -1.0
    scale = opt.layer_stats()["scale"].item()
    assert scale == pytest.approx(1 / (0.1 * (square**0.5 + 1e-8)), rel=1e-13)


def test_state_is_a_momentum_and_a_number_a_layer():
    params = [Parameter(torch.zeros(64, 32)), Parameter(torch.zeros(64))]
    opt = layerlr.AdamMini([{"params": params[:1], "split": 4}, {"params": params[1:]}])
    for p, layers in zip(params, (4, 1), strict=True):
        state = opt.state[p]
        assert state.keys() == {"exp_avg", "step", "second_moment"}
        assert state["exp_avg"].dtype == torch.float32 and state["exp_avg"].shape == p.shape
        assert state["second_moment"].dtype == F64 and state["second_moment"].shape == (layers,)


def test_signature_is_that_of_adamw():
    mine = list(inspect.signature(layerlr.AdamMini).parameters.values())
    theirs = dict(inspect.signature(torch.optim.AdamW).parameters)
    del theirs["amsgrad"]
    assert [(p.name, p.default, p.kind) for p in mine[: len(theirs)]] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


# -- once a step -----------------------------------------------------------------------------------


def test_a_layer_that_is_skipped_keeps_its_second_moment(engine):
    params, twins = (engine.params(random(((4, 3), (2, 5)))) for _ in range(2))
    opt, twin = (layerlr.AdamMini(p, lr=0.1, backend=engine.backend) for p in (params, twins))
    for step in range(4):
        set_grads(params, step)
        set_grads(twins, step)
        if step in (0, 2):  # the first one too
            params[0].grad[1, 1] = float("nan")
            twins[0].grad = None
        before = state_of(opt, params[0])["second_moment"].item()
        opt.step()
        twin.step()
        now = opt.state[params[0]]["second_moment"].item()
        assert (now == before) == (step in (0, 2))
    assert opt.state[params[0]]["step"] == 2 and opt.state[params[1]]["step"] == 4
    pairs = ((opt, params), (twin, twins))
    moments = [[of.state[p]["second_moment"] for p in ps] for of, ps in pairs]
    assert same_bits(*moments)
    assert same_bits([params[1]], [twins[1]])


def test_no_gradient_is_no_step(engine):
    params = engine.params(random(((4, 3), (2, 5))))
    opt = layerlr.AdamMini(params, lr=0.1, backend=engine.backend)
    cases.train(opt, params, 2)
    before = [*copies(params[:1]), opt.state[params[0]]["second_moment"].clone()]
    params[0].grad = None
    set_grads(params[1:], 7)
    opt.step()
    opt.zero_grad()
    opt.step()
    assert same_bits([params[0], opt.state[params[0]]["second_moment"]], before)


def test_an_overflow_changes_nothing(engine):
    params = engine.params(random(((4, 3), (2, 5)), torch.float32))
    opt = layerlr.AdamMini(params, lr=0.1, fused=True, backend=engine.backend)
    cases.train(opt, params, 2)
    before = [*copies(params), *(x.clone() for s in opt.state.values() for x in s.values())]
    set_grads(params, 5)
    opt.grad_scale = torch.tensor(8.0, device=engine.device)
    opt.found_inf = torch.tensor(1.0, device=engine.device)
    opt.step()
    assert same_bits([*params, *(x for s in opt.state.values() for x in s.values())], before)


def test_advances_at_a_rate_of_zero_as_adam(engine):
    (p,) = engine.params(random(((4, 3),)))
    opt = layerlr.AdamMini([p], lr=0.0, backend=engine.backend)
    before = copies([p])
    cases.train(opt, [p], 2)
    assert same_bits([p], before) and opt.state[p]["step"] == 2
    set_grads([p], 0)
    first = (p.grad**2).mean().item()
    set_grads([p], 1)
    second = (p.grad**2).mean().item()
    expected = (0.999 * first + second) * 0.001 / (1 - 0.999**2)
    assert opt.state[p]["second_moment"].item() == pytest.approx(expected, rel=1e-12)


def test_numbers_of_the_group_count(engine):
    """Betas and eps are read at each step; no plan is built for them."""
    (p,) = engine.params(random(((4, 3),)))
    opt = layerlr.AdamMini([p], lr=0.1, weight_decay=0.0, backend=engine.backend)
    cases.train(opt, [p], 1)
    plans = opt.plans.groups[0]
    opt.param_groups[0].update(betas=(0.0, 0.0), eps=2.0)
    before = copies([p])[0]
    set_grads([p], 3)
    opt.step()
    g = p.grad
    torch.testing.assert_close(p.detach(), before - 0.1 * g / ((g**2).mean().sqrt() + 2.0))
    assert opt.plans.groups[0] is plans


# -- state dicts, other ways to step ---------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_resumes_to_the_bit(backend):
    def make(p):
        groups = [{"params": p[:1], "split": 2}, {"params": p[1:]}]
        return layerlr.AdamMini(groups, lr=0.05, backend=backend)

    runs = []
    for resumes in (False, True):
        params = [Parameter(v) for v in random(((4, 3), (5,)), torch.float32)]
        opt = make(params)
        cases.train(opt, params, 3)
        if resumes:
            saved = opt.state_dict()
            assert saved["param_groups"][0]["rule"] == {"name": "adam_mini"}
            params = [Parameter(v) for v in copies(params)]
            opt = make(params)
            opt.load_state_dict(saved)
        cases.train(opt, params, 3, seed=3)
        runs.append([*params, *(opt.state[p]["second_moment"] for p in params)])
    assert same_bits(*runs)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_goes_on_from_adamw(backend):
    """The momentum and the count are AdamW's; the second moment begins with its own gradients."""
    (p,) = [Parameter(v) for v in random(((4, 3),))]
    adamw = torch.optim.AdamW([p], lr=0.01)
    cases.train(adamw, [p], 30)
    opt = layerlr.AdamMini([p], lr=0.01, weight_decay=0.0, backend=backend)
    opt.load_state_dict(adamw.state_dict())
    opt.param_groups[0]["weight_decay"] = 0.0
    before, m = copies([p])[0], adamw.state[p]["exp_avg"].clone()
    set_grads([p], 99)
    opt.step()
    g = p.grad
    m_hat = (0.9 * m + 0.1 * g) / (1 - 0.9**31)
    expected = before - 0.01 * m_hat / ((g**2).mean().sqrt() + 1e-8)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=0)


def test_in_backward_and_compiled():
    """Both step as ``step()`` does."""
    torch.manual_seed(0)
    runs = []
    for how in ("step", "backward", "compiled"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
        opt = layerlr.AdamMini(model.parameters(), lr=0.05)
        handle = layerlr.step_in_backward(model, opt) if how == "backward" else None
        step = opt.step
        if how == "compiled":
            torch._dynamo.reset()
            step = torch.compile(opt.step, fullgraph=True, backend="eager")
        for k in range(4):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(k))
            model(x).square().mean().backward()
            if how != "backward":
                step()
                opt.zero_grad()
        if handle is not None:
            handle.remove()
        runs.append([*model.parameters(), *(s["second_moment"] for s in opt.state.values())])
    assert same_bits(runs[0], runs[1]) and same_bits(runs[0], runs[2])


def test_takes_a_rule_on_top():
    """Another rule is put on its steps as on any optimizer's."""
    params = [Parameter(v) for v in random(((4, 3),))]
    opt = layerlr.wrap(layerlr.AdamMini(params, lr=0.01), "hyperball", lr=0.05)
    norm = params[0].norm().item()
    cases.train(opt, params, 3)
    assert params[0].norm().item() == pytest.approx(norm, rel=1e-12)
    assert opt.base.state[params[0]]["second_moment"].item() > 0


def _sharded(placements):
    mesh = init_device_mesh("cpu", (2,))
    values = random(((7, 5), (3, 6), (5, 2)))
    whole = [Parameter(v) for v in values]
    parts = [Parameter(distribute_tensor(v, mesh, placements)) for v in values]
    blocks = (1, 3, 5)  # rows that a process does not have among them

    def make(params):
        groups = [{"params": [p], "split": n} for p, n in zip(params, blocks, strict=True)]
        return layerlr.AdamMini(groups, lr=0.05, betas=(0.8, 0.9))

    opt, sharded = make(whole), make(parts)
    for step in range(5):
        set_grads(whole, step)
        for p, q in zip(whole, parts, strict=True):
            q.grad = distribute_tensor(p.grad, mesh, placements)
        opt.step()
        with CommDebugMode() as seen:
            sharded.step()
        assert seen.get_total_counts() == 1
    for p, q in zip(whole, parts, strict=True):
        torch.testing.assert_close(full(q.detach()), p.detach(), rtol=1e-12, atol=1e-14)
        mine = everywhere_the_same(sharded.state[q]["second_moment"])
        torch.testing.assert_close(mine, opt.state[p]["second_moment"], rtol=1e-13, atol=0)
    dist.barrier()


@pytest.mark.parametrize("placement", [Shard(0), Shard(1)], ids=["rows", "columns"])
def test_sharded_steps_are_those_of_whole_tensors(placement):
    run(2, _sharded, [placement])


# -- what is refused -------------------------------------------------------------------------------

REFUSED = [
    ({"rule": "layca"}, r"AdamMini takes no rule, got Layca\(.*layerlr.wrap to put a rule on it"),
    ({"adapt": "kernels"}, "no plain step, got adapt='kernels'"),
    ({"plain_lr": 0.1}, "no plain step, got plain_lr=0.1"),
    ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
    ({"eps": -1.0}, "Invalid epsilon value: -1.0"),
    ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
    ({"lr": -1.0}, "Invalid learning rate: -1.0"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[m[:20] for _, m in REFUSED])
def test_refuses(options, message):
    params = [Parameter(torch.ones(2, 2))]
    with pytest.raises(ValueError, match=message):
        layerlr.AdamMini(params, **options)
    if options.keys() <= {"rule", "adapt", "plain_lr"}:
        opt = layerlr.AdamMini(params)
        late = Parameter(torch.ones(2, 2))
        with pytest.raises(ValueError, match=message):
            opt.add_param_group({"params": [late], **options})
        assert len(opt.param_groups) == 1 and late not in opt.state


def test_its_rule_goes_with_no_other_class():
    p = Parameter(torch.ones(2, 2))
    for rule in ("adam_mini", layerlr.rules.AdamMini()):
        with pytest.raises(ValueError, match="no rule on top of SGD: it is all of"):
            layerlr.SGD([p], rule=rule)
        with pytest.raises(ValueError, match="no rule on top of Wrapped"):
            layerlr.wrap(torch.optim.SGD([p], 0.1), rule, lr=0.1)
    with pytest.raises(ValueError, match=r"unknown rule 'mini', known are (?!.*adam_mini)"):
        layerlr.SGD([p], rule="mini")
