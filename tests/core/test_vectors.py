"""Numbers worked out by hand from the papers' formulas, and LARS and LAMB spelled out."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from selection import NONE
from torch import tensor

import layerlr
from layerlr.rules import Brake, Hyperball, Lamb, Lars, Layca, Relative

# Triton's numbers are held against the spec, and the emulation's are the C++ formulas'.
pytestmark = pytest.mark.asked(triton=NONE, simt=NONE)

F64 = torch.float64
SLOW, SLOWER = 3**-3, 3**-5


def close(got, expected, terms=1.0):
    """The vectors have 12 decimals; a float32 step rounds a few times at the size of its terms."""
    expected = torch.as_tensor(expected, dtype=F64)
    tolerance = 1e-12 if got.dtype == F64 else 4 * torch.finfo(torch.float32).eps * terms
    torch.testing.assert_close(got.detach().cpu().double(), expected, rtol=0, atol=tolerance)


@pytest.fixture
def run(engine, wide):
    """Weights after each step of one parameter under given gradients."""

    def run(cls, weights, gradients, before=lambda group, t: None, **kwargs):
        (w,) = engine.params([tensor(weights, dtype=F64)], wide)
        opt = cls([w], backend=engine.backend, **kwargs)
        for t, g in enumerate(gradients, 1):
            before(opt.param_groups[0], t)
            w.grad = tensor(g, dtype=F64).to(w)
            opt.step()
            yield w.detach().clone()

    return run


# -- Lion ------------------------------------------------------------------------------------------

#: betas, weight decay -> weights; the gradients change their signs, the momentum not always
LION_WALK = {
    ((0.9, 0.99), 0.0): [[0.9, 1.1], [1.0, 1.2]],
    ((0.9, 0.99), 0.5): [[0.85, 1.05], [0.9075, 1.0975]],
    ((0.5, 0.5), 0.0): [[0.9, 1.1], [0.8, 1.2]],  # signSGD with momentum
    ((0.0, 0.9), 0.0): [[0.9, 1.1], [1.0, 1.0]],  # signSGD
}


@pytest.mark.parametrize(("betas", "decay"), LION_WALK)
def test_lion_two_steps(run, betas, decay):
    gradients = [[1.0, -2.0], [-0.3, 0.1]]
    walk = run(layerlr.Lion, [1.0, 1.0], gradients, lr=0.1, betas=betas, weight_decay=decay)
    for w, e in zip(walk, LION_WALK[betas, decay], strict=True):
        close(w, e)


# -- Singh et al. ----------------------------------------------------------------------------------

FACTORS = {
    1e-8: 19.420680753952,
    0.01: 5.615120516841,
    0.1: 3.397895272798,
    1.0: 1.693147180560,
    5.0: 1.182321556794,
    100.0: 1.009950330853,
}


@pytest.mark.parametrize("norm", FACTORS)
def test_singh_factor(engine, norm):
    # one weight of zero under lr 1 moves by factor*norm
    (w,) = engine.params([torch.zeros(1, dtype=F64)])
    opt = layerlr.SGD([w], lr=1.0, rule="singh", backend=engine.backend)
    w.grad = torch.full_like(w, -norm)
    opt.step()
    # the vectors have 12 decimals of the factor
    assert w.item() / norm == pytest.approx(FACTORS[norm], abs=1e-12)
    assert opt.layer_stats()["scale"].item() == pytest.approx(FACTORS[norm], abs=1e-12)


JOINT = ([[0.052883654246, -0.137178205661], [0.3, 0.4]], [0.05, -0.238465383016])
APART = ([[0.037041631340, -0.116055508453], [0.3, 0.4]], [0.05, -0.242736296428])


@pytest.mark.parametrize(
    ("layers", "expected", "factors"),
    [
        ("module", JOINT, [1.570544858468]),
        ("tensor", APART, [2.098612288668, 1.606135803570]),
    ],
)
def test_singh_weight_and_bias(engine, wide, layers, expected, factors):
    values = [[[0.1, -0.2], [0.3, 0.4]], [0.05, -0.05]]
    params = engine.params([tensor(v, dtype=F64) for v in values], wide)
    named = [("fc.weight", params[0]), ("fc.bias", params[1])]
    opt = layerlr.SGD(named, lr=0.1, rule="singh", layers=layers, backend=engine.backend)
    for p, g in zip(params, ([[0.3, -0.4], [0, 0]], [0, 1.2])):
        p.grad = tensor(g, dtype=F64).to(p)
    opt.step()
    for p, e in zip(params, expected):
        close(p, e)
    close(opt.layer_stats()["scale"].to(wide), factors)


SINGH_WALK = {
    "momentum": (
        layerlr.SGD,
        {"momentum": 0.9},
        [[0.937041631340, -1.083944491547], [0.859991727909, -1.132311371756]],
    ),
    "nesterov": (
        layerlr.SGD,
        {"momentum": 0.9, "nesterov": True},
        [[0.880379099546, -1.159494533939], [0.790646814821, -1.175841563945]],
    ),
    "adagrad": (
        layerlr.Adagrad,
        {"eps": 1e-8},
        [[0.790138778129, -1.209861223620], [0.723500571456, -1.143223016403]],
    ),
}


@pytest.mark.parametrize("name", SINGH_WALK)
def test_singh_two_steps(run, name):
    cls, kwargs, expected = SINGH_WALK[name]
    walk = run(cls, [1.0, -1.0], [[0.3, 0.4], [0.06, -0.08]], lr=0.1, rule="singh", **kwargs)
    for w, e in zip(walk, expected, strict=True):
        close(w, e)


# -- Layca -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", ["initial", "current"])
@pytest.mark.parametrize(
    ("lr", "step", "expected", "distance"),
    [
        (0.1, [1.0, 0.0], [2.587096694546, 4.278659917903], 0.004962809790),
        (SLOW, [1.0, 0.0], [2.849897859261, 4.108294316597], 0.000685166233),
        (SLOW, [6.0, 8.0], [3.0, 4.0], 0.0),
    ],
)
def test_layca_one_step(run, radius, lr, step, expected, distance):
    rule = Layca(radius=radius)
    (w,) = run(layerlr.SGD, [3.0, 4.0], [step], lr=lr, rule=rule, adapt="all")
    close(w, expected, terms=4.0)
    cosine = torch.nn.functional.cosine_similarity(
        w.cpu().double(), tensor([3.0, 4.0], dtype=F64), dim=0
    )
    close((1 - cosine).to(w.dtype), distance)


# -- rules of two elements: w = [3, 4], radius 5 ---------------------------------------------------

ONE_STEP = [
    (Hyperball(), 0.1, [1.0, 0.0], [2.649994700016, 4.239991520025]),
    (Hyperball(), SLOW, [1.0, 0.0], [2.877467030873, 4.089032096504]),
    (Hyperball(radius=2.0), 0.1, [1.0, 0.0], [1.146924688727, 1.638463841038]),
    (Hyperball(radius=2.0), SLOW, [1.0, 0.0], [1.180782544300, 1.614234364358]),
    (Layca(max_angle=0.05), 0.1, [1.0, 0.0], [2.934837857305, 4.048052216972]),
    (Layca(max_angle=0.01), 0.1, [1.0, 0.0], [2.959850667913, 4.029799501669]),
    (Brake(outward=0.5), 0.5, [-0.6, -0.8], [3.15, 4.2]),
    (Brake(outward=0.5), 0.5, [-1.0, 0.5], [3.455795625900, 3.702638170607]),
    (Brake(outward=0.5), 0.5, [1.0, 0.0], [2.5, 4.0]),
    # a floor of 0.35 on u/w at lr 0.1
    (Lamb(min_ratio=1 / 0.35), 0.035, [1.0, 0.0], [2.825, 4.0]),
    (Lamb(min_ratio=1 / 0.35), 0.035, [6.0, 8.0], [2.4, 3.2]),
    (Relative(), 0.1, [1.0, 0.0], [2.5, 4.0]),
]


@pytest.mark.parametrize(("rule", "lr", "step", "expected"), ONE_STEP)
def test_rules_one_step(run, rule, lr, step, expected):
    (w,) = run(layerlr.SGD, [3.0, 4.0], [step], lr=lr, rule=rule, adapt="all")
    close(w, expected, terms=4.0)


W0, G1, G2 = [[1.0, 2.0], [-2.0, 0.0]], [[0.5, -1.0], [0.25, 2.0]], [[-1.0, 0.5], [1.0, 0.5]]


def test_hyperball_two_steps(run):
    walk = [*run(layerlr.SGD, W0, [G1, G2], lr=SLOW, momentum=0.9, rule=Hyperball())]
    close(walk[0], [[0.964959519881, 2.025252048078], [-1.989502169959, -0.095333008315]])
    close(walk[1], [[0.969394890911, 2.004014742705], [-2.002333339704, -0.186707399972]])


def adam_as_keras(group, t):
    """Keras adds eps before the correction of the second moment, torch after it."""
    group["eps"] = 1e-7 / math.sqrt(1 - 0.999**t)


LAYCA_WALK = {
    "momentum": (
        layerlr.SGD,
        {"lr": SLOW, "momentum": 0.9},
        {
            1: [[0.962969144533, 2.026587890021], [-1.988844289663, -0.100649600956]],
            2: [[0.968061816290, 2.001337666169], [-2.003591698185, -0.207663604852]],
        },
    ),
    "averaged": (
        layerlr.AMomSGD,
        {"lr": SLOWER, "momentum": 0.9},
        {2: [[0.996602280472, 2.000728094746], [-2.000833774458, -0.023134226537]]},
    ),
    "adam": (
        layerlr.Adam,
        {"lr": SLOWER, "before": adam_as_keras},
        {
            1: [[0.990487921597, 2.002359001678], [-2.002358934060, -0.007127745791]],
            2: [[0.991424840215, 1.998029625859], [-2.006148055609, -0.018010534994]],
        },
    ),
    "rmsprop": (
        layerlr.RMSprop,
        {"lr": SLOW, "alpha": 0.9, "eps": 1e-7},
        {1: [[0.913840080149, 2.019998386346], [-2.019998325530, -0.064106099000]]},
    ),
}


@pytest.mark.parametrize("name", LAYCA_WALK)
@pytest.mark.parametrize("radius", ["initial", "current"])
def test_layca_two_steps(run, name, radius):
    cls, kwargs, expected = LAYCA_WALK[name]
    walk = list(run(cls, W0, [G1, G2], rule=Layca(radius=radius), **kwargs))
    for t, e in expected.items():
        close(walk[t - 1], e, terms=2.0)


@pytest.mark.parametrize("lr", [1e-3, SLOWER, SLOW, 1.0, 30.0])
@pytest.mark.parametrize("name", cases.DIRECTION_ROWS)
def test_layca_rotates_by_atan_lr(engine, name, lr):
    _, cls, kwargs = cases.DIRECTION_ROWS[name]
    (w,) = engine.params(cases.random([(6, 5)]))
    before = w.detach().clone()
    opt = cls([w], **{**kwargs, "lr": lr}, rule="layca", backend=engine.backend)
    cases.set_grads([w], 0)
    opt.step()
    distance = 1 - torch.nn.functional.cosine_similarity(before.flatten(), w.flatten(), dim=0)
    # rounding of the two norms and the product, each a few eps of 1
    assert distance.item() == pytest.approx(1 - 1 / math.sqrt(1 + lr * lr), abs=1e-14)
    assert w.norm().item() == pytest.approx(before.norm().item(), rel=1e-14)


DEPTH = {
    (5, 0.2): [0.32768, 0.433099269505, 0.572433402240, 0.756593287203, 1.0],
    (5, -0.6): [1.0, 0.318108291507, 0.101192885125, 0.032190295800, 0.01024],
    (4, 0.0): [1.0] * 4,
    (1, 0.6): [1.0],
    (1, -0.6): [1.0],
}


@pytest.mark.parametrize(("n", "alpha"), DEPTH)
def test_depth_multipliers(n, alpha):
    assert layerlr.depth_multipliers(n, alpha) == pytest.approx(DEPTH[n, alpha], abs=1e-12)


@pytest.mark.parametrize(
    ("n", "alpha", "named"),
    [(0, 0.1, "n_layers"), (2.5, 0.1, "n_layers"), (3, 1.0, "alpha"), (3, -1.0, "alpha")],
)
def test_depth_multipliers_out_of_range(n, alpha, named):
    with pytest.raises(ValueError, match=f"Invalid {named}: {n if named == 'n_layers' else alpha}"):
        layerlr.depth_multipliers(n, alpha)


# -- LARS and LAMB ---------------------------------------------------------------------------------


def lars_by_hand(w, grads, lr, mu, wd, trust):
    """Algorithm 1 of You et al. 2017, one number at a time; lr stays outside of the buffer."""
    v = [0.0] * len(w)
    for g in grads:
        wn, gn = math.sqrt(sum(x * x for x in w)), math.sqrt(sum(x * x for x in g))
        local = trust * wn / (gn + wd * wn)
        v = [mu * a + local * (b + wd * c) for a, b, c in zip(v, g, w)]
        w = [a - lr * b for a, b in zip(w, v)]
    return w


def lamb_by_hand(w, grads, lr, b1, b2, eps, wd):
    """Algorithm 2 of You et al. 2020, one number at a time, phi the identity."""
    m, v = [0.0] * len(w), [0.0] * len(w)
    for t, g in enumerate(grads, 1):
        m = [b1 * a + (1 - b1) * b for a, b in zip(m, g)]
        v = [b2 * a + (1 - b2) * b * b for a, b in zip(v, g)]
        r = [
            (a / (1 - b1**t)) / (math.sqrt(b / (1 - b2**t)) + eps) + wd * c
            for a, b, c in zip(m, v, w)
        ]
        ratio = math.sqrt(sum(x * x for x in w)) / math.sqrt(sum(x * x for x in r))
        w = [a - lr * ratio * b for a, b in zip(w, r)]
    return w


@pytest.mark.parametrize("wd", [0.0, 0.1])
@pytest.mark.parametrize("rule", ["lars", "lamb"])
def test_spelled_out(run, rule, wd):
    weights = cases.random([(12,)], seed=5)[0].tolist()
    grads = [cases.random([(12,)], seed=s)[0].tolist() for s in range(4)]
    if rule == "lars":
        kwargs = {"momentum": 0.9, "weight_decay": wd, "lr": 2.0}
        walk = run(layerlr.SGD, weights, grads, rule=Lars(eps=0), adapt="all", **kwargs)
        expected = lars_by_hand(weights, grads, 2.0, 0.9, wd, 1e-3)
    else:
        kwargs = {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": wd, "lr": 0.02}
        walk = run(layerlr.AdamW, weights, grads, rule=Lamb(), adapt="all", **kwargs)
        expected = lamb_by_hand(weights, grads, 0.02, 0.8, 0.9, 1e-6, wd)
    close(list(walk)[-1], expected, terms=len(grads))
