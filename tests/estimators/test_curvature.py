"""Step sizes from curvature: vectors by hand, unbiased estimates, coupling, convergence."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from curvature_nets import BARE, D, descend, estimates, kept, mlp, near, signed, step
from selection import NONE
from torch import nn
from torch.nn import Parameter

import layerlr
from layerlr.rules import Curvature

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True"),
    # the rates are Python's, and the rule that takes them is in the table
    pytest.mark.asked(triton=NONE, simt=NONE),
]
#: section 3 of the papers' notes: layers (x1, x2) and (y), gradient at (1, 1, 1)
H = [[2.0, 0.5, 0.3], [0.5, 1.0, -0.2], [0.3, -0.2, 4.0]]
G = [1.0, -2.0, 0.5]


def vector_a(engine):
    """Parameters and the quadratic with gradient G and Hessian H at (1, 1, 1)."""
    x, y = engine.params([torch.ones(2, dtype=D), torch.ones(1, dtype=D)])
    h, g = (torch.tensor(v, dtype=D, device=engine.device) for v in (H, G))

    def loss():
        move = torch.cat([x, y]) - 1.0
        return 0.5 * move @ h @ move + g @ move

    return [x, y], loss


def sgd(engine, params, rule, **options):
    return layerlr.SGD(params, lr=1.0, rule=rule, backend=engine.backend, **options)


# -- vectors ---------------------------------------------------------------------------------------


def test_vector_a(engine):
    params, loss = vector_a(engine)
    opt = sgd(engine, params, Curvature("exact", **BARE))
    step(opt, loss)
    near(kept(opt, params), [1.25, 0.25])
    near(torch.cat(params), [-0.25, 3.5, 0.875])
    near(estimates(opt, params), [4 / 5, 1 / 0.25])  # c/uu
    stats = opt.layer_stats()
    near(stats["gg"], [5.0, 0.25])  # rho, where u = g
    near(stats["scale"], [1.25, 0.25])


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"damping": 0.1}, [1.111111111111, 0.243902439024]),
        ({"damped": True}, [0.357142857143, 0.2]),
    ],
)
def test_vector_a_damping(engine, options, rates):
    params, loss = vector_a(engine)
    opt = sgd(engine, params, Curvature("exact", **{**BARE, **options}))
    step(opt, loss)
    near(kept(opt, params), rates, 2e-12)


@pytest.mark.parametrize(
    ("signs", "c"),
    [
        ((1, 1), (4.35, 1.35)),
        ((-1, -1), (4.35, 1.35)),
        ((1, -1), (3.65, 0.65)),
        ((-1, 1), (3.65, 0.65)),
    ],
)
def test_vector_a_signed(engine, monkeypatch, signs, c):
    signed(monkeypatch, *signs)
    params, loss = vector_a(engine)
    opt = sgd(engine, params, Curvature("hessian", **BARE))
    step(opt, loss)
    near(estimates(opt, params), [c[0] / 5, c[1] / 0.25])
    near(kept(opt, params), [5 / c[0], 0.25 / c[1]])


def test_vector_a_coupled(engine):
    """By hand: one unit of length each, r = (1/sqrt 5, 2), and C = [[4, .35], [.35, 1]]."""
    params, loss = vector_a(engine)
    opt = sgd(engine, params, Curvature("exact", damping=0.0, max_step=math.inf))
    step(opt, loss)
    r, off = (5**-0.5, 2.0), 0.35
    k2 = [(16 + (r[1] * off / r[0]) ** 2) / 25, (1 + (r[0] * off / r[1]) ** 2) / 0.25**2]
    near(estimates(opt, params), k2)
    a = [5 / (k2[0] ** 0.5 * 5), 0.25 / (k2[1] ** 0.5 * 0.25)]
    bend = 4 * a[0] ** 2 + a[1] ** 2 + 2 * off * a[0] * a[1]
    slope = 5 * a[0] + 0.25 * a[1]
    assert bend < slope  # nothing to shrink
    near(kept(opt, params), a)


def test_the_joint_step_shrinks_to_the_minimum_along_it(engine):
    """Rates that are held up by min_step overshoot; damping counts in the joint step too."""
    params, loss = vector_a(engine)
    opt = sgd(engine, params, Curvature("exact", damping=0.1, min_step=3.0, max_step=3.0))
    step(opt, loss)
    over = 9 * (4 + 1 + 2 * 0.35 + 0.1 * 5.25) / (3 * 5.25)
    near(kept(opt, params), [3 / over] * 2)


def test_vector_b(engine):
    """The first step of Adam, u = sign(g)."""
    params, loss = vector_a(engine)
    opt = layerlr.AdamW(
        params,
        lr=1.0,
        betas=(0.5, 0.75),
        eps=1e-30,
        weight_decay=0.0,
        rule=Curvature("exact", **BARE),
        backend=engine.backend,
    )
    step(opt, loss)
    near(kept(opt, params), [1.5, 0.125])  # 3/2, .5/4
    near(torch.cat(params), [-0.5, 2.5, 0.875])


@pytest.mark.parametrize(
    ("rule", "signs", "c"),
    [
        ("exact", (1, 1), (0.140625, 2.25)),
        ("hessian", (1, 1), (-0.984375, 1.125)),
        ("hessian", (1, -1), (1.265625, 3.375)),
    ],
)
def test_vector_c(engine, monkeypatch, rule, signs, c):
    """``(w2*w1*x - y)^2/2`` at x=1, y=2: the Hessian is indefinite, its diagonal is not."""
    signed(monkeypatch, *signs)
    params = engine.params([torch.tensor(1.0, dtype=D), torch.tensor(0.5, dtype=D)])
    opt = sgd(engine, params, Curvature(rule, **BARE))
    step(opt, lambda: 0.5 * (params[1] * params[0] - 2) ** 2)
    near(estimates(opt, params), [c[0] / 0.5625, c[1] / 2.25])
    near(kept(opt, params), [0.5625 / abs(c[0]), 2.25 / c[1]])
    if rule == "exact":
        near(torch.stack(params), [4.0, 2.0])


@pytest.mark.parametrize(("last", "wanted"), [(0.0, 1e-6), (0.3, 0.3)])
def test_vector_d(engine, last, wanted):
    """With momentum the second layer ascends: its last rate, or min_step where there is none."""
    params, loss = vector_a(engine)
    opt = sgd(engine, params, Curvature("exact", coupled=False, damping=0.0), momentum=0.9)
    for p, m in zip(params, ([0.5, 1.0], [-1.0])):
        opt.state[p]["momentum_buffer"].copy_(torch.tensor(m))
        opt.state[p]["step"].fill_(1)
    opt.state[params[1]]["rate"].fill_(last)
    step(opt, loss)
    near(kept(opt, params), [0.955497382199, wanted], 1e-12)
    near(estimates(opt, params) * torch.tensor([1.45**2 + 1.1**2, 0.16], dtype=D), [3.82, 0.64])
    a, b = 0.955497382198953, wanted
    near(torch.cat(params), [1 - 1.45 * a, 1 + 1.1 * a, 1 + 0.4 * b])


def explicit(model, loss):
    """C and uu of plain gradient descent, from the full Hessian row by row."""
    params = list(model.parameters())
    grads = torch.autograd.grad(loss(), params, create_graph=True)
    flat = torch.cat([g.flatten() for g in grads])
    hessian = torch.stack(
        [torch.cat([h.flatten() for h in torch.autograd.grad(e, params, retain_graph=True)])
         for e in flat]
    )  # fmt: skip
    u = torch.block_diag(*[g.detach().flatten()[None] for g in grads])
    return u @ hessian @ u.mT, u.square().sum(1)


@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("coupled", [False, True])
def test_the_mean_over_all_signs_is_exact(monkeypatch, coupled, decay):
    model, plain = mlp()
    params = list(model.parameters())

    def loss():
        return plain() + 0.5 * decay * sum(p.square().sum() for p in params)

    matrix, uu = explicit(model, loss)
    so_far = torch.tensor([0.3, 2.0, 0.1, 0.7], dtype=D)  # the mean k
    r = ((so_far + 1e-3) * uu).rsqrt()

    def estimate(rule):
        opt = layerlr.SGD(params, lr=0.0, weight_decay=decay, rule=rule)
        for p, k in zip(params, so_far):
            opt.state[p]["estimate"].fill_(k * k)
            opt.state[p]["estimate_weight"].fill_(1.0)
        step(opt, plain)  # decay comes from the optimizer here
        return estimates(opt, params)

    seen = []
    for signs in itertools.product((-1.0, 1.0), repeat=4):
        signed(monkeypatch, *signs)
        seen.append(estimate(Curvature("hessian", coupled=coupled, ema=0.0)))
    mean = torch.stack(seen).mean(0)
    squares = (r * matrix / r[:, None]).square().sum(1) / uu.square()
    wanted = (squares if coupled else matrix.diagonal() / uu).tolist()
    near(mean, wanted, 1e-11)
    near(estimate(Curvature("exact", coupled=coupled, ema=0.0)), wanted, 1e-11)
    assert torch.stack(seen).std(0).min() > 1e-4  # single draws differ


def test_signs_are_fair_and_a_function_of_seed_and_step():
    """Every pattern of the signs turns up; the same seed and step give the same one."""
    params = [Parameter(torch.ones(1, dtype=D)) for _ in range(3)]

    def loss():
        return torch.cat(params).sum() ** 2

    def run(seed, steps=64):
        opt = layerlr.SGD(params, lr=0.0, rule=Curvature(coupled=False, ema=0.0, seed=seed))
        rows = []
        for _ in range(steps):
            step(opt, loss)
            rows.append(tuple(kept(opt, params, "estimate").tolist()))
        return rows

    first = run(1)
    # k_l = 2*s_l*(s_1+s_2+s_3): up to a common sign 4 patterns
    assert len(set(first)) == 4
    near(torch.tensor(first).mean(0), [2.0] * 3, 0.75)
    assert run(1, 8) == first[:8] and run(2, 8) != first[:8]


@pytest.mark.parametrize("weights", [True, False])
def test_fisher_is_gauss_newton_in_the_mean(weights):
    """Of a linear model with cross-entropy, whose Hessian is the Gauss-Newton matrix."""
    torch.manual_seed(5)
    model = nn.Linear(3, 3, bias=True).to(D)
    x, t = torch.randn(6, 3, dtype=D), torch.tensor([0, 1, 2, 0, 2, 1])
    params = list(model.parameters())

    def loss():
        return F.cross_entropy(model(x), t)

    split = {"params": params, "split": 3} if weights else {"params": params}
    size = 6 if weights else 2
    exact = layerlr.SGD([split], lr=0.0, rule=Curvature("exact", coupled=False))
    step(exact, loss)
    opt = layerlr.SGD([split], lr=0.0, rule=Curvature("fisher", coupled=False, ema=0.0))
    opt.attach(model)
    seen = []
    for _ in range(100):
        step(opt, loss)
        seen.append(kept(opt, params, "estimate"))
    seen = torch.stack(seen)
    assert seen.shape[1] == size and (seen >= 0).all()
    error = seen.std(0) / len(seen) ** 0.5
    assert ((seen.mean(0) - estimates(exact, params)).abs() < 5 * error).all()


class Drops(nn.Module):
    """Layers that draw random numbers and move buffers."""

    def __init__(self):
        super().__init__()
        # a bias before the norm would have a gradient of rounding errors alone
        self.a, self.b = nn.Linear(3, 4, bias=False), nn.Linear(4, 2)
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.3)

    def forward(self, x):
        return self.b(self.drop(torch.tanh(self.norm(self.a(x)))))


def drops(rule, clear=True, **options):
    """Model, optimizer and closure; the same numbers for every rule."""
    torch.manual_seed(7)
    model = Drops().to(D)
    x, t = torch.randn(6, 3, dtype=D), torch.tensor([0, 1, 1, 0, 1, 0])
    opt = layerlr.SGD(model.named_parameters(), lr=0.5, momentum=0.9, rule=rule, **options)

    def closure():
        if clear:
            opt.zero_grad()
        loss = F.cross_entropy(model(x), t)
        loss.backward(create_graph=opt.is_second_order)
        return loss

    return model, opt, closure


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("coupled", [False, True])
def test_finite_differences_are_hessian_products(coupled, decay):
    """To sqrt(eps) of float64; the same signs, the same dropout mask."""
    found = []
    for kind in ("hessian", "finite-difference"):
        rule = Curvature(kind, coupled=coupled, max_step=math.inf)
        model, opt, closure = drops(rule, weight_decay=decay)
        opt.attach(model)
        rates = []
        for _ in range(3):
            opt.step(closure)
            rates.append(torch.cat([s["rate"] for s in opt.state.values()]))
        found.append(torch.stack(rates))
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def photograph(model, grads=True):
    tensors = [*model.parameters(), *model.buffers(), torch.get_rng_state()]
    tensors += [p.grad for p in model.parameters()] if grads else []
    return [t.detach().clone() for t in tensors]


@pytest.mark.parametrize("adapt", ["all", "kernels"])
@pytest.mark.parametrize("clear", [True, False])
def test_finite_differences_leave_no_trace(clear, adapt):
    """Weights, buffers, random state, and every gradient (also of parameters beside the rule)."""
    rule = Curvature("finite-difference")
    model, opt, closure = drops(rule, clear, adapt=adapt)
    opt.param_groups[0]["lr"] = 0.0
    opt.attach(model)
    opt.step(closure)
    after = photograph(model)
    twin, _, closure = drops(None, clear)
    closure()
    assert all(torch.equal(a, b) for a, b in zip(after, photograph(twin), strict=True))
    assert kept(opt, [model.a.weight]) > 1e-3


def test_finite_differences_without_clearing_are_the_same():
    """A closure may leave the clearing of gradients to its caller."""
    found = []
    for clear in (True, False):
        model, opt, closure = drops(Curvature("finite-difference"), clear)
        opt.attach(model)
        for _ in range(2):
            opt.zero_grad()
            opt.step(closure)
        found.append(photograph(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("at", [2, 3])
def test_a_closure_that_raises_at_other_weights_changes_nothing(at):
    model, opt, closure = drops(Curvature("finite-difference"))
    opt.attach(model)
    calls = []

    def raises():
        calls.append(1)
        if len(calls) == at:
            torch.rand(3)
            model(torch.randn(4, 3, dtype=D)).sum().backward()
            raise FloatingPointError("boom")
        return closure()

    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="boom"):
        opt.step(raises)
    twin, _, closure = drops(None)
    closure()
    assert all(torch.equal(a, b) for a, b in zip(photograph(model), photograph(twin), strict=True))
    assert all(torch.equal(a, p) for a, p in zip(weights, model.parameters(), strict=True))
    assert "momentum_buffer" not in opt.state or not kept(opt, [model.a.weight]).any()


@pytest.mark.parametrize(
    ("first", "norm"),
    [
        ("hessian", False),
        ("finite-difference", False),
        pytest.param("finite-difference", True),
    ],
)
def test_finite_differences_beside_a_rule_that_needs_the_graph(first, norm):
    second = {"hessian": "finite-difference", "finite-difference": "hessian"}[first]
    model, _, _ = drops(None)
    if not norm:
        model.norm = nn.Identity()
    groups = [  # the graph of a holds the weights of b
        {"params": m.parameters(), "rule": Curvature(kind, coupled=False)}
        for m, kind in ((model.b, first), (model.a, second))
    ]
    opt = layerlr.SGD(groups, lr=0.1)
    opt.attach(model)
    x = torch.randn(6, 3, dtype=D)

    def closure():
        opt.zero_grad()
        model(x).square().sum().backward(create_graph=opt.is_second_order)

    opt.step(closure)
    for m in (model.a, model.b):
        assert (kept(opt, list(m.parameters())) > 0).all()


def test_coupled_layers_diverge_each_for_itself_and_converge_together():
    """Three scalars with correlations .9: Jacobi's method diverges there."""
    hessian = torch.full((3, 3), 0.9, dtype=D) + 0.1 * torch.eye(3, dtype=D)
    start = torch.tensor([1.0, 0.5, -0.2], dtype=D)
    alone = descend(hessian, [1, 1, 1], start, Curvature("exact", coupled=False), 40)
    assert alone[-1] > 1e6 * alone[0]
    for ema in (0.0, 0.9):
        joint = descend(hessian, [1, 1, 1], start, Curvature("exact", ema=ema), 140)
        assert joint[-1] < 1e-8 * joint[0]
        assert (joint[1:] <= joint[:-1] * (1 + 1e-12)).all()


@pytest.mark.parametrize("kind", ["exact", "hessian"])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("seed", [0, 1])
def test_linear_convergence_on_quadratics(kind, scale, seed):
    """From any start, without a rate: the loss never rises, and falls by a fixed factor."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(8, 16, generator=generator, dtype=D)
    start = scale * torch.randn(8, generator=generator, dtype=D)
    losses = descend(root @ root.mT, [3, 2, 3], start, Curvature(kind), 120)
    assert (losses[1:] <= losses[:-1] * (1 + 1e-12)).all()
    assert losses[-1] < 1e-8 * losses[0]
    assert (losses[60:] < 0.1 * losses[:-60]).all()


def test_the_path_scales_with_its_start():
    hessian = torch.tensor(H, dtype=D)
    start = torch.tensor([1.0, -0.5, 2.0], dtype=D)
    rule = Curvature("exact")  # no number in it has the unit of weights
    small, large = (descend(hessian, [2, 1], s * start, rule, 20) for s in (2.0**-10, 2.0**10))
    torch.testing.assert_close(large, small * 2.0**40, rtol=1e-9, atol=0)
