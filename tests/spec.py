"""The formulas once more: float64 numpy, one line of the papers at a time, nothing from layerlr.

Every quantity travels with its *size*: the same formula over absolute values, which bounds what one
rounding of its terms can do to it (running error analysis). A correct step in arithmetic of unit
``eps`` is therefore within ``ULPS * eps * size`` of the spec whatever cancels, and a wrong term is
not. `Spec.follow` copies an optimizer's weights and state before each step, so the bound is that of
one step and nothing accumulates.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from cases import RATE

#: A step is at most 16 roundings deep (decay 2, momentum 3, second moment 5, quotient 2, a and b 2,
#: their products and the sum 2), half an eps each, on terms that ``size`` counts once.
ULPS = 8


def array(t) -> np.ndarray:
    return t.detach().cpu().double().numpy().copy()


def norm(parts) -> float:
    return math.sqrt(math.fsum(float(np.sum(x * x)) for x in parts))


def dot(xs, ys) -> float:
    return math.fsum(float(np.sum(x * y)) for x, y in zip(xs, ys, strict=True))


def is_kernel(w) -> bool:
    return sum(n > 1 for n in w.shape) > 1


def over(x, y):
    """``x / y`` where y is not zero, else 0."""
    return np.divide(x, y, out=np.zeros(np.shape(x)), where=np.asarray(y) != 0)


# -- directions: (gradient, its size, state, step number, hyper-parameters) -> (u, size of u); the
# state is replaced in place, the sizes of its entries are left under "size" -----------------------


def sgd(g, size, s, t, h):
    if h["momentum"] == 0:
        return g, size
    gain = 1.0 if t == 1 else 1.0 - h["dampening"]
    s["size"] = {"momentum_buffer": h["momentum"] * abs(s["momentum_buffer"]) + gain * size}
    s["momentum_buffer"] = h["momentum"] * s["momentum_buffer"] + gain * g
    m, m_size = s["momentum_buffer"], s["size"]["momentum_buffer"]
    if h["nesterov"]:
        return g + h["momentum"] * m, size + h["momentum"] * m_size
    return m, m_size


def averaged(g, size, s, t, h):
    mu = h["momentum"]
    s["size"] = {"momentum_buffer": mu * abs(s["momentum_buffer"]) + (1 - mu) * size}
    s["momentum_buffer"] = mu * s["momentum_buffer"] + (1 - mu) * g
    return s["momentum_buffer"], s["size"]["momentum_buffer"]


def quotient(x, x_size, square, square_size, unbias, eps):
    """``x / (sqrt(square)*unbias + eps)``; an error of the square counts by half its share."""
    below = np.sqrt(square) * unbias + eps
    return over(x, below), over(x_size, below) + abs(over(x, below)) * over(square_size, square)


def adagrad(g, size, s, t, h):
    s["size"] = {"sum": s["sum"] + size * size}
    s["sum"] = s["sum"] + g * g
    return quotient(g, size, s["sum"], s["size"]["sum"], 1.0, h["eps"])


def rmsprop(g, size, s, t, h):
    a = h["alpha"]
    s["size"] = {"square_avg": a * s["square_avg"] + (1 - a) * size * size}
    s["square_avg"] = a * s["square_avg"] + (1 - a) * g * g
    square, square_size = s["square_avg"], s["size"]["square_avg"]
    if h["centered"]:
        s["size"]["grad_avg"] = a * abs(s["grad_avg"]) + (1 - a) * size
        s["grad_avg"] = a * s["grad_avg"] + (1 - a) * g
        square = square - s["grad_avg"] ** 2
        square_size = square_size + s["size"]["grad_avg"] ** 2
    u, u_size = quotient(g, size, square, square_size, 1.0, h["eps"])
    if h["momentum"] > 0:
        s["size"]["momentum_buffer"] = h["momentum"] * abs(s["momentum_buffer"]) + u_size
        s["momentum_buffer"] = h["momentum"] * s["momentum_buffer"] + u
        return s["momentum_buffer"], s["size"]["momentum_buffer"]
    return u, u_size


def adam(g, size, s, t, h):
    b1, b2 = h["betas"]
    gain = 1 - b1 if getattr(h["rule"], "grad_averaging", True) else 1.0
    s["size"] = {
        "exp_avg": b1 * abs(s["exp_avg"]) + gain * size,
        "exp_avg_sq": b2 * s["exp_avg_sq"] + (1 - b2) * size * size,
    }
    s["exp_avg"] = b1 * s["exp_avg"] + gain * g
    s["exp_avg_sq"] = b2 * s["exp_avg_sq"] + (1 - b2) * g * g
    square, square_size = s["exp_avg_sq"], s["size"]["exp_avg_sq"]
    if h["amsgrad"]:
        square_size = np.maximum(s["max_exp_avg_sq"], square_size)
        s["size"]["max_exp_avg_sq"] = square_size
        square = s["max_exp_avg_sq"] = np.maximum(s["max_exp_avg_sq"], square)
    first = second = 1.0
    if getattr(h["rule"], "bias_correction", True):
        first, second = 1 / (1 - b1**t), 1 / math.sqrt(1 - b2**t)
    m, m_size = s["exp_avg"] * first, s["size"]["exp_avg"] * first
    return quotient(m, m_size, square, square_size, second, h["eps"])


class Undecided(AssertionError):
    """A step hangs on the sign of what rounding may have made of 0: no test can hold it to one."""


def lion(g, size, s, t, h):
    """Lion's step is exact or undecided: its size is itself."""
    b1, b2 = h["betas"]
    c = b1 * s["exp_avg"] + (1 - b1) * g  # of the old momentum, as in the paper
    s["size"] = {"exp_avg": b2 * abs(s["exp_avg"]) + (1 - b2) * size}
    s["exp_avg"] = b2 * s["exp_avg"] + (1 - b2) * g
    # of the new one, as the engines form it: other terms, of which rounding takes its share
    c_size = b1 / b2 * s["size"]["exp_avg"] + abs(1 - b1 / b2) * size
    doubt = ULPS * np.finfo(np.float32).eps * c_size
    if ((abs(c) <= doubt) & (c_size > 0)).any():
        raise Undecided("choose other test data")
    return np.sign(c), abs(np.sign(c))


def first_moment(g, size, s, t, h):
    """Adam-mini's: Adam's momentum, divided by what the layer's second moment makes of it."""
    b1, _ = h["betas"]
    s["size"] = {"exp_avg": b1 * abs(s["exp_avg"]) + (1 - b1) * size}
    s["exp_avg"] = b1 * s["exp_avg"] + (1 - b1) * g
    return s["exp_avg"], s["size"]["exp_avg"]


DIRECTIONS = {
    "SGD": sgd,
    "AMomSGD": averaged,
    "Adagrad": adagrad,
    "RMSprop": rmsprop,
    "Adam": adam,
    "AdamW": adam,
    "Lion": lion,
    "AdamMini": first_moment,
}


#: rules that scale the step, each a method below
UPDATE_RULES = ("lamb", "layca", "rated", "hyperball", "relative", "brake", "adam_mini")
#: classes whose weight decay is decoupled
DECOUPLED = ("AdamW", "Lion", "AdamMini")
#: rules whose step does not hold it
APART = ("relative", "adam_mini")


class Spec:
    """One param group.

    ``layers`` lists the parameters of each layer that the rule governs (default: every parameter
    for singh, those of two dimensions for the others, one a layer); the rest takes the plain step
    at ``plain`` times lr.
    """

    def __init__(self, kind, group, weights, layers=None, lr_scale=None, plain=1.0):
        self.kind, self.h, self.rule = kind, group, group["rule"]
        self.w = [array(w) for w in weights]
        self.state = [{} for _ in self.w]
        self.size = [np.zeros(w.shape) for w in self.w]
        name = self.rule.name if self.rule is not None else None
        if layers is None:
            everything = name in ("singh", "plain", "rated", "adam_mini")
            layers = [[i] for i, w in enumerate(self.w) if everything or is_kernel(w)]
        self.layers = layers if name else []
        self.lr_scale = lr_scale or [1.0] * len(self.layers)
        self.plain_scale = plain
        self.radius = [0.0] * len(self.layers)
        inside = {i for layer in self.layers for i in layer}
        frozen = getattr(self.rule, "others", "plain") == "freeze"
        self.plain = [i for i in range(len(self.w)) if i not in inside and not frozen]
        self.stats = {}

    def follow(self, opt, params) -> None:
        """Start the next step from the optimizer's weights and state, frozen ones aside."""
        self.w = [array(p) for p in params]
        self.state = [{k: array(v) for k, v in opt.state.get(p, {}).items()} for p in params]

    def step(self, grads) -> None:
        self.size = [np.zeros(w.shape) for w in self.w]
        sign = -1.0 if self.h["maximize"] else 1.0
        grads = [sign * array(g) for g in grads]
        for i in self.plain:
            self._step([i], grads, None, self.plain_scale, None)
        for index, members in enumerate(self.layers):
            self._step(members, grads, self.rule, self.lr_scale[index], index)

    def _step(self, members, raw, rule, lr_scale, index) -> None:
        h, name = self.h, rule.name if rule is not None else "plain"
        decoupled = self.kind in DECOUPLED or h.get("decoupled_weight_decay", False)
        decay = h["weight_decay"]
        w = [self.w[i] for i in members]
        raw = [raw[i] for i in members]
        g, size = raw, [abs(x) for x in raw]
        if not decoupled:
            g = [x + decay * y for x, y in zip(g, w)]
            size = [x + decay * abs(y) for x, y in zip(size, w)]
        steps = [self.state[i]["step"].item() + 1 for i in members]
        lr = float(h["lr"]) * lr_scale
        if self.kind == "Adagrad":
            lr = lr / (1 + (steps[0] - 1) * h["lr_decay"])

        # the factor of a rule in gradient order
        f, weight, gradient = 1.0, norm(w), norm(raw if name == "lars" else g)
        if name == "singh":
            f = 1 + math.log(1 + 1 / gradient) if gradient > 0 else 0.0
            slack = norm(size) / gradient if gradient > 0 else 0.0
            size = [x + abs(y) * slack for x, y in zip(size, g)]
        if name == "lars" and weight > 0 and gradient > 0:
            l2 = 0.0 if decoupled else decay
            f = rule.trust * weight / (gradient + l2 * weight + rule.eps)
            if rule.trust_clip:  # LARC: the rate lr*f is at most lr
                f = min(f / lr, 1.0) if lr > 0 else 1.0
        first_order = self.kind in ("SGD", "AMomSGD")
        if first_order:
            g, size = [f * x for x in g], [f * x for x in size]

        u, u_size = [], []
        for i, x, x_size, t in zip(members, g, size, steps):
            x, x_size = DIRECTIONS[self.kind](x, x_size, self.state[i], t, h)
            u.append(x)
            u_size.append(x_size)

        if name in UPDATE_RULES:
            self.seen = gradient**2, sum(x.size for x in w), self.state[members[0]], steps[0]
            if decoupled and name not in APART:
                u = [x + decay * y for x, y in zip(u, w)]
                u_size = [x + decay * abs(y) for x, y in zip(u_size, w)]
            update = getattr(self, f"_{name}")
            new, moved, scale = update(w, u, u_size, lr, rule, index)
            if decoupled and name in APART:
                new = [y - lr * decay * x for x, y in zip(w, new)]
        else:
            rate = lr if first_order else lr * f
            keep = 1 - lr * decay if decoupled else 1.0
            new = [keep * x - rate * y for x, y in zip(w, u)]
            moved, scale = [rate * x for x in u_size], f
        for i, x, y, y_size in zip(members, w, new, moved):
            self.w[i] = y
            self.size[i] = abs(x) + abs(y) + y_size
        if index is not None:
            gg = gradient**2
            self.stats[index] = (weight**2, gg, dot(u, u), dot(w, u), scale, lr * scale)

    def _lamb(self, w, u, u_size, lr, rule, index):
        weight, step = norm(w), norm(u)
        phi = weight if rule.clip is None else min(weight, rule.clip)
        ratio = 1.0
        if weight > 0 and step > 0:
            ratio = min(phi / step, 1.0) if rule.trust_clip else phi / step
            ratio = max(ratio, rule.min_ratio or 0.0)
            ratio = min(ratio, math.inf if rule.max_ratio is None else rule.max_ratio)
        slack = norm(u_size) / step if step > 0 else 0.0
        size = [lr * ratio * (y + abs(x) * slack) for x, y in zip(u, u_size)]
        return [x - lr * ratio * y for x, y in zip(w, u)], size, ratio

    _relative = _lamb

    def _hyperball(self, w, u, u_size, lr, rule, index):
        weight, step = norm(w), norm(u)
        if weight == 0 and isinstance(rule.radius, str):
            return [x - lr * y for x, y in zip(w, u)], [lr * x for x in u_size], 1.0
        if step == 0:
            return w, [0 * x for x in w], 0.0
        if rule.radius == "initial" and lr > 0:
            self.radius[index] = self.radius[index] or weight
        radius = rule.radius if not isinstance(rule.radius, str) else self.radius[index] or weight
        if lr == 0:
            return w, [0 * x for x in w], radius / step
        s = lr * radius / step
        moved = [x - s * y for x, y in zip(w, u)]
        back = radius / norm(moved)
        slack = norm(u_size) / step
        size = [back * s * (z + abs(y) * slack) for y, z in zip(u, u_size)]
        return [back * x for x in moved], size, back * radius / step

    def _brake(self, w, u, u_size, lr, rule, index):
        weight, moved = norm(w), [x - lr * y for x, y in zip(w, u)]
        length, back = norm(moved), 1.0
        if length > weight:
            back = (weight + rule.outward * (length - weight)) / length
        return [back * x for x in moved], [lr * x for x in u_size], back

    def _rated(self, w, u, u_size, lr, rule, index):
        rate = lr * RATE
        return [x - rate * y for x, y in zip(w, u)], [rate * x for x in u_size], RATE

    def _adam_mini(self, w, u, u_size, lr, rule, index):
        (b1, b2), (gg, n, state, t) = self.h["betas"], self.seen
        v = 0.0 if t == 1 else state["second_moment"].item() * (1 - b2 ** (t - 1))
        v = (b2 * v + (1 - b2) * gg / max(n, 1)) / (1 - b2**t)
        state["second_moment"] = state["size"]["second_moment"] = np.array([v])
        rate = 1 / (1 - b1**t) / (math.sqrt(v) + self.h["eps"])
        return [x - lr * rate * y for x, y in zip(w, u)], [lr * rate * x for x in u_size], rate

    def _layca(self, w, u, u_size, lr, rule, index):
        weight = norm(w)
        if weight == 0:
            return [x - lr * y for x, y in zip(w, u)], [lr * x for x in u_size], 1.0
        along = dot(w, u) / weight**2
        s = [y - along * x for x, y in zip(w, u)]  # 1: orthogonal to the weights
        length = norm(s)
        if not length > rule.eps * norm(u):
            return w, [0 * x for x in w], 0.0
        angle = lr
        if rule.max_angle is not None:
            own = math.atan2(lr * length, weight - lr * dot(w, u) / weight)
            angle = math.tan(min(own, rule.max_angle))
        s = [x * (weight / length) for x in s]  # 2: as long as the weights
        new = [x - angle * y for x, y in zip(w, s)]  # 3: the step
        if rule.radius == "initial" and lr > 0:
            self.radius[index] = self.radius[index] or weight
        back = (self.radius[index] or weight) / norm(new)
        if lr == 0:
            return w, [0 * x for x in w], weight / length * back
        new = [x * back for x in new]  # 4: back on the sphere
        slack = norm(u_size) / length  # what a rounding of u turns the direction by
        size = [
            angle * (weight / length * z + slack * (abs(x) + abs(y)))
            for x, y, z in zip(w, s, u_size)
        ]
        return new, size, weight / length * back * angle / lr

    def differences(self, params, opt):
        """How far an optimizer is from the spec, in ``eps * size``: (what, number) pairs."""
        single = torch.finfo(torch.float32).eps
        # the coarsest arithmetic of the list: what one tensor adds to a sum reaches its whole layer
        unit = max(min(torch.finfo(p.dtype).eps, single) for p in params)
        floor = torch.finfo(torch.float32).smallest_normal  # below it eps is not relative
        for i, p in enumerate(params):
            eps, half = torch.finfo(p.dtype).eps, 0.0
            if eps > single:  # the weight is rounded once more, to its own dtype
                least = torch.finfo(p.dtype).smallest_normal
                half = eps / 2 * np.maximum(abs(self.w[i]), least)
            off = abs(array(p) - self.w[i]) - half
            yield f"parameter {i}", _worst(off, np.maximum(unit * self.size[i], floor))
            for key, size in self.state[i].get("size", {}).items():
                off = abs(array(opt.state[p][key]) - self.state[i][key])
                yield f"{key} of parameter {i}", _worst(off, np.maximum(unit * size, floor))

    def check(self, params, opt) -> None:
        for what, number in self.differences(params, opt):
            assert number <= ULPS, f"{what} is off by {number:.3g} eps"


def _worst(off, unit) -> float:
    if off.size == 0:
        return 0.0
    assert np.isfinite(off).all()
    return float(np.max(np.where(off > 0, off / unit, 0.0)))
