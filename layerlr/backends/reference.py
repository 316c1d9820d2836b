"""The specification: plain PyTorch, any floating dtype, any device, no host synchronisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from layerlr import devices, precision
from layerlr.directions.base import Scalar
from layerlr.rules import LayerRule, LayerStats, Plain

from .base import Hyper, PlanSpec, accumulator, check_gradient


class ReferenceBackend:
    """Formulas spelled out one rounding at a time, so that native engines can equal their bits."""

    name = "reference"

    def unsupported(self, spec: PlanSpec) -> str | None:
        return None

    def plan(self, spec: PlanSpec) -> ReferencePlan:
        return ReferencePlan(spec)


class ReferencePlan:
    """One step over a `LayerTable`, tensor by tensor."""

    traceable = False

    def __init__(self, spec: PlanSpec) -> None:
        self.spec = spec
        self.active: list[int] = []
        self.kinds = [(p.dtype, p.shape, p.device) for p in spec.table.params]
        self.update = (spec.rule or Plain()).order == "update"
        self.steps: dict[int, Scalar] = {}
        self.before: list[tuple[Tensor, Tensor]] | None = None

    def prepare(self) -> bool:
        spec = self.spec
        if devices.capturing(spec.table.device):
            raise RuntimeError(
                "backend 'reference' takes its numbers from Python and cannot be captured in a "
                "CUDA graph: use backend='cuda' or 'triton'"
            )
        self.active = []
        for i, p in enumerate(spec.table.params):
            if p.grad is None:
                continue
            state = spec.states[i]
            if state is None or (p.dtype, p.shape, p.device) != self.kinds[i]:
                return False
            values = [state.get(key) for key in spec.direction.states]
            if any(v is None or v.shape != p.shape for v in values) or "step" not in state:
                return False
            held = self._held(i)
            if held and precision.KEYS[held] not in state:
                return False
            check_gradient(spec.table.names[i], p, p.grad)
            self.active.append(i)
        return True

    def step(self, hyper: Hyper) -> None:
        self.apply(hyper, self.measure(hyper))

    def norms(self, hyper: Hyper) -> Tensor:
        total = self._zeros().gg
        for i in self.active:
            g = self._load(i, hyper)[1]
            self._sum(i, total, g, g)
        return total

    def measure(self, hyper: Hyper) -> Tensor:
        sums = self._zeros()
        self.before = None
        if not self._nothing(hyper):
            if isinstance(hyper.found_inf, Tensor) and hyper.found_inf.device.type != "cpu":
                self.before = [(x, x.clone()) for x in self._everything()]
            self.steps = {i: self._coming_step(i) for i in self.active}
            measure = self._measure_update if self.update else self._measure_gradient
            for rule, tensors in self._by_rule():
                measure(hyper, rule, tensors, sums)
        return torch.stack([*sums], 1)

    def apply(self, hyper: Hyper, sums: Tensor) -> None:
        if self._nothing(hyper):
            return
        lr = self._layer_lr(hyper)
        scale = self._scale_update if self.update else self._scale_gradient
        for rule, tensors in self._by_rule():
            scale(hyper, rule, lr, tensors, LayerStats(*sums.unbind(1)))
        for x, old in self.before or ():  # the host does not know
            found = hyper.found_inf.to(x.device)  # type: ignore[union-attr]
            x.copy_(torch.where(found != 0, old, x))
        self.before = None

    def refresh(self, hyper: Hyper) -> None:
        """Nothing is captured here."""

    def _nothing(self, h: Hyper) -> bool:
        """Whether the host knows that nothing is to change."""
        found = h.found_inf
        known = not isinstance(found, Tensor) or found.device.type == "cpu"
        return known and bool(found)

    def _everything(self) -> list[Tensor]:
        """All that a step may change."""
        everything = [self.spec.stats]
        for i in self.active:
            state = self._state_dict(i).values()
            everything += [self.spec.table.params[i].detach(), *state]
        return everything

    def _by_rule(self) -> Iterator[tuple[LayerRule, list[int]]]:
        """The tensors that take part, those under the rule and the others."""
        table = self.spec.table
        for rule, ruled in ((self.spec.rule or Plain(), True), (Plain(), False)):
            tensors = [i for i in self.active if table.ruled[table.parts[i][0].layer] == ruled]
            if tensors:
                yield rule, tensors

    # -- the two orders -----------------------------------------------------------------------

    def _measure_gradient(
        self, h: Hyper, rule: LayerRule, tensors: list[int], sums: LayerStats
    ) -> None:
        """Measure w and g."""
        for i in tensors:
            w, g0, g = self._load(i, h)
            measured = g0 if rule.raw_gradient else g
            self._sum(i, sums.gg, measured, measured)
            self._sum(i, sums.ww, w, w)

    def _scale_gradient(
        self, h: Hyper, rule: LayerRule, lr: Tensor, tensors: list[int], sums: LayerStats
    ) -> None:
        """Ask the rule for f, then ``u = direction(f*g)`` or ``f*direction(g)``."""
        d = self.spec.direction
        f = rule.factor(sums, lr, 0.0 if h.decoupled else h.weight_decay)
        keep = self._skips(h, [sums.gg, sums.ww] if "ww" in rule.measures else [sums.gg])
        ones = torch.ones_like(lr)
        a = 1.0 - lr * h.weight_decay if h.decoupled else ones
        grad, b = (f, -lr) if d.first_order else (ones, -(lr * f))
        seen = self._zeros()._replace(gg=sums.gg)
        for i in tensors:
            w, _, g = self._load(i, h)
            c = d.scalars(h.direction, self.steps[i])
            old = self._state(i)
            g = g * self.spec.table.spread(i, grad, g)
            new = d.advance(g, old, c)
            u = d.direction(g, new, c)
            for total, x, y in ((seen.ww, w, w), (seen.uu, u, u), (seen.wu, w, u)):
                self._sum(i, total, x, y)
            kept = self.spec.table.spread(i, keep, w)
            self._store_state(i, [torch.where(kept, o, n) for o, n in zip(old, new, strict=True)])
            self._store(i, w, u, a, b, kept)
        self._finish(tensors, seen, f, lr * f, a, b, keep)

    def _measure_update(
        self, h: Hyper, rule: LayerRule, tensors: list[int], sums: LayerStats
    ) -> None:
        """Advance the state, measure all."""
        for i in tensors:
            w, g, new, u = self._coming(i, h)
            self._store_state(i, new)
            for total, x, y in zip(sums, (w, g, u, w), (w, g, u, u), strict=True):
                self._sum(i, total, x, y)

    def _scale_update(
        self, h: Hyper, rule: LayerRule, lr: Tensor, tensors: list[int], sums: LayerStats
    ) -> None:
        """Ask the rule for a and b, then ``w <- a*w + b*u``."""
        d = self.spec.direction
        # the rule sees u + decay*w, whose sums follow from those of u
        decay = h.weight_decay if h.decoupled else 0.0
        seen = sums._replace(
            uu=(sums.uu + 2.0 * decay * sums.wu + decay * decay * sums.ww).clamp(min=0.0),
            wu=sums.wu + decay * sums.ww,
        )
        keep = self._skips(h, sums)
        kept, whole = self._kept(rule, lr)
        if rule.latches:  # the norm of a part of the layer is no radius
            kept = torch.where(whole, kept, 0.0)
        scale = rule.scale(seen, lr, kept)
        if rule.latches:
            latch = whole & ~keep & (kept == 0) & (sums.ww > 0) & (scale.b != 0)
            self._latch(rule, latch, sums.ww.sqrt())
        a = scale.a + scale.b * decay
        for i in tensors:
            w, _, g = self._load(i, h)
            u = d.direction(g, self._state(i), d.scalars(h.direction, self.steps[i]))
            self._store(i, w, u, a, scale.b, self.spec.table.spread(i, keep, w))
        self._finish(tensors, seen, scale.scale, lr * scale.scale, scale.a, scale.b, keep)

    def directions(self, h: Hyper, tensors: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """(g with L2 decay, u) of tensors, as a step in update order will form them."""
        self.steps = {i: self._coming_step(i) for i in self.active}
        found = []
        for i in tensors:
            _, g, _, u = self._coming(i, h)
            found.append((g, u))
        return found

    def _coming(self, i: int, h: Hyper) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor]:
        """Weights, gradient with L2 decay, new state and step of an update rule."""
        d = self.spec.direction
        w, g0, g = self._load(i, h)
        c = d.scalars(h.direction, self.steps[i])
        old = self._state(i)
        new = d.advance(g, old, c)
        if h.skip:  # an element with a bad gradient keeps its state
            good = torch.isfinite(g0)
            new = tuple(torch.where(good, n, o) for o, n in zip(old, new, strict=True))
        return w, g, new, d.direction(g, new, c)

    # -- per tensor ---------------------------------------------------------------------------

    def _load(self, i: int, h: Hyper) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, gradient and gradient with L2 decay, in the dtype of the arithmetic."""
        p = self.spec.table.params[i]
        dtype = accumulator(p.dtype)
        held = self._held(i)
        w = precision.load(p, self._state_dict(i), held) if held else _own(_real(p).to(dtype))
        g = _own(_real(p.grad).to(dtype))  # type: ignore[arg-type]
        if isinstance(h.sign, Tensor) or h.sign != 1.0:
            g = g * (h.sign.to(g) if isinstance(h.sign, Tensor) else h.sign)
        decayed = g + w * h.weight_decay if h.weight_decay and not h.decoupled else g
        return w, g, decayed

    def _held(self, i: int) -> precision.Precision:
        """How the weights of tensor i are held, where it is not as they are."""
        return precision.of([self.spec.table.params[i]], self.spec.precision)

    def _state_dict(self, i: int) -> dict[str, Any]:
        state = self.spec.states[i]
        assert state is not None
        return state

    def _state(self, i: int) -> list[Tensor]:
        dtype = accumulator(self.spec.table.params[i].dtype)
        state = self._state_dict(i)
        return [_own(_real(state[k]).to(dtype)) for k in self.spec.direction.states]

    def _store_state(self, i: int, new: Sequence[Tensor]) -> None:
        for key, value in zip(self.spec.direction.states, new, strict=True):
            _real(self._state_dict(i)[key]).copy_(value)

    def _store(self, i: int, w: Tensor, u: Tensor, a: Tensor, b: Tensor, keep: Tensor) -> None:
        """``w <- a*w + b*u``; a step of zero leaves the weight's bits, the sign of a zero too."""
        p = self.spec.table.params[i]
        moved, step = w * self.spec.table.spread(i, a, w), u * self.spec.table.spread(i, b, w)
        moved = torch.where(step == 0, moved, moved + step)
        if held := self._held(i):
            places = precision.places(p, len(self.spec.table.parts[i]) > 1)
            precision.store(p, self._state_dict(i), held, w, moved, self.steps[i], places, keep)
            return
        target = _real(p)
        target.copy_(torch.where(keep, target, moved.to(target.dtype)))

    def _coming_step(self, i: int) -> Scalar:
        """Number of the coming step: a host number, or a device scalar under capture."""
        step = self._state_dict(i)["step"]
        return step.double() + 1.0 if step.device.type != "cpu" else step.item() + 1.0

    # -- per layer ----------------------------------------------------------------------------

    def _zeros(self) -> LayerStats:
        table = self.spec.table
        zero = torch.zeros(len(table.layers), dtype=torch.float64, device=table.device)
        return LayerStats(*(zero.clone() for _ in range(4)))

    def _sum(self, i: int, total: Tensor, x: Tensor, y: Tensor) -> None:
        """Add ``sum(x*y)`` of each part of tensor i to its layer."""
        self.spec.table.sum(i, x.double() * y.double(), total)

    def _layer_lr(self, h: Hyper) -> Tensor:
        """Rate of each layer: lr, its lr_scale, the direction's own decay at its first tensor."""
        table, d = self.spec.table, self.spec.direction
        lr = torch.tensor(table.lr_scale, dtype=torch.float64, device=table.device)
        lr = lr * (h.lr.double().reshape(()) if isinstance(h.lr, Tensor) else h.lr)
        rate = torch.ones_like(lr)
        for i in reversed(self.active):
            for span in self.spec.table.parts[i]:
                rate[span.layer] = d.rate(h.direction, self.steps[i])
        return lr * rate

    def _skips(self, h: Hyper, sums: Sequence[Tensor]) -> Tensor:
        """Layers to leave alone: those with a sum that is not finite."""
        if not h.skip:
            return torch.zeros_like(sums[0], dtype=torch.bool)
        return ~torch.stack([torch.isfinite(s) for s in sums]).all(0)

    def _leaders(self, rule: LayerRule) -> list[tuple[int, int, int]]:
        return self.spec.table.leaders(self.spec.states) if rule.kept else []

    def _kept(self, rule: LayerRule, like: Tensor) -> tuple[Tensor, Tensor]:
        """What the rule keeps of each layer (0: nothing) and whether all of it takes part."""
        kept, whole = torch.zeros_like(like), torch.ones_like(like, dtype=torch.bool)
        for layer, i, k in self._leaders(rule):
            kept[layer] = self._state_dict(i)[str(rule.kept)][k].clone()
        for i in set(range(len(self.spec.table.params))) - set(self.active):
            for span in self.spec.table.parts[i]:
                whole[span.layer] = False
        return kept, whole

    def _latch(self, rule: LayerRule, where: Tensor, value: Tensor) -> None:
        for layer, i, k in self._leaders(rule):
            stored = self._state_dict(i)[str(rule.kept)]
            stored[k] = torch.where(where[layer], value[layer], stored[k])

    def _finish(
        self,
        tensors: list[int],
        seen: LayerStats,
        scale: Tensor,
        lr: Tensor,
        a: Tensor,
        b: Tensor,
        keep: Tensor,
    ) -> None:
        """Advance the step counts and write the layers' row of statistics."""
        took_part = torch.zeros_like(keep)
        for i in tensors:
            kept = torch.stack([keep[s.layer] for s in self.spec.table.parts[i]]).all()
            step = self._state_dict(i)["step"]
            step += (~kept).to(step)
            for span in self.spec.table.parts[i]:
                took_part[span.layer] = True
        stats = self.spec.stats
        rows = torch.stack([*seen, scale, lr, a, b], 1).detach()
        stats[:, :-1] = torch.where((took_part & ~keep).unsqueeze(1), rows, stats[:, :-1])
        stats[:, -1] += keep & took_part


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _own(x: Tensor) -> Tensor:
    """A copy where autograd records (differentiable=True): what it saves must not change."""
    return x.clone() if torch.is_grad_enabled() else x
