"""The specification: plain PyTorch, any floating dtype, any device, no host synchronisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from layerlr import _C, codes, devices
from layerlr.directions.base import Scalar
from layerlr.rules import LayerRule, LayerStats, Plain

from .base import PlanSpec, check_tensors
from .config import DECOUPLED_DECAY, DIRECTION, FOUND_INF, L2, LR, PLAIN, StepConfig
from .decide import Layers, decide
from .operands import Operands


class ReferenceBackend:
    """Formulas spelled out one rounding at a time, so that native engines can equal their bits."""

    name = "reference"

    def missing(self, device: torch.device) -> str | None:
        return devices.absent(device)

    def unsupported(self, spec: PlanSpec) -> str | None:
        return None

    def plan(self, spec: PlanSpec) -> ReferencePlan:
        return ReferencePlan(spec)


class ReferencePlan:
    """One step over a `LayerTable`, tensor by tensor."""

    def __init__(self, spec: PlanSpec) -> None:
        self.spec, self.operands = spec, Operands(spec)
        self.active: list[int] = []
        self.known = list(map(_C.Known, spec.table.params, spec.states))
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
            if spec.states[i] is None or not self.known[i].fits():
                return False
            check_tensors(spec.table.names[i], p, p.grad, spec.states[i])
            self.active.append(i)
        rule = spec.rule
        return rule is None or all(self._holds_memory(rule, i) for _, i, _ in self._leaders(rule))

    def _holds_memory(self, rule: LayerRule, i: int) -> bool:
        """Whether the state of tensor i, which may have no gradient, has its layers' numbers."""
        if not self.known[i].is_same():
            return False
        memory: Tensor = self.operands.state_dict(i)[str(rule.memory_key)]
        return memory.dtype == torch.float64

    def step(self, config: StepConfig) -> None:
        self.apply(config, self.measure(config))

    def norms(self, config: StepConfig) -> Tensor:
        total = self._zeros().gg
        for i in self.active:
            g = self.operands.load(i, config)[1]
            self._sum(i, total, g, g)
        return total

    def measure(self, config: StepConfig) -> Tensor:
        sums = self._zeros()
        self.before = None
        if not config.changes_nothing:
            if FOUND_INF in config.tensors:
                self.before = [(x, x.clone()) for x in self._everything()]
            self.steps = {i: self.operands.coming_step(i) for i in self.active}
            measure = self._measure_update if self.update else self._measure_gradient
            for rule, tensors in self._by_rule():
                measure(config, rule, tensors, sums)
        return torch.stack([*sums], 1)

    def apply(self, config: StepConfig, sums: Tensor) -> None:
        if config.changes_nothing:
            return
        lr = self._layer_lr(config)
        scale = self._scale_update if self.update else self._scale_gradient
        for rule, tensors in self._by_rule():
            scale(config, rule, lr, tensors, LayerStats(*sums.unbind(1)))
        for x, old in self.before or ():  # the host does not know
            found = config.tensors[FOUND_INF].to(x.device)
            x.copy_(torch.where(found != 0, old, x))
        self.before = None

    def forget(self) -> None:
        self.before = None

    def refresh(self, config: StepConfig) -> None:
        """Nothing is captured here."""

    def _everything(self) -> list[Tensor]:
        """All that a step may change."""
        everything = [self.spec.stats]
        for i in self.active:
            state = self.operands.state_dict(i).values()
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
        self, config: StepConfig, rule: LayerRule, tensors: list[int], sums: LayerStats
    ) -> None:
        """Measure w and g."""
        for i in tensors:
            w, g0, g = self.operands.load(i, config)
            measured = g0 if rule.raw_gradient else g
            self._sum(i, sums.gg, measured, measured)
            self._sum(i, sums.ww, w, w)

    def _scale_gradient(
        self, config: StepConfig, rule: LayerRule, lr: Tensor, tensors: list[int], sums: LayerStats
    ) -> None:
        """Ask the rule for f, then ``u = direction(f*g)`` or ``f*direction(g)``."""
        d = self.spec.direction
        f = rule.factor(sums, lr, config.values[L2])
        if rule.plain_at_zero:
            f = f * torch.where(sums.ww > 0, 1.0, config.get(PLAIN))
        skip = self._skips(config, [sums.gg, sums.ww] if rule.measures_ww else [sums.gg])
        ones = torch.ones_like(lr)
        a = 1.0 - lr * config.values[DECOUPLED_DECAY]
        grad, b = (f, -lr) if d.first_order else (ones, -(lr * f))
        seen = self._zeros()._replace(gg=sums.gg)
        for i in tensors:
            w, _, g = self.operands.load(i, config)
            c = d.scalars(config.values[DIRECTION:], self.steps[i])
            old = self.operands.state(i)
            g = g * self.spec.table.spread(i, grad, g)
            packed = self.operands.pack(i, d.advance(g, old, c))
            u = d.direction(g, self.operands.unpack(i, packed), c)
            for total, x, y in ((seen.ww, w, w), (seen.uu, u, u), (seen.wu, w, u)):
                self._sum(i, total, x, y)
            skipped = self.spec.table.spread(i, skip, w)
            self.operands.store_state(i, packed, skipped)
            self.operands.store(i, w, u, a, b, skipped, self.steps[i])
        self._finish(tensors, seen, f, lr * f, a, b, skip)

    def _measure_update(
        self, config: StepConfig, rule: LayerRule, tensors: list[int], sums: LayerStats
    ) -> None:
        """Advance the state, measure all."""
        for i in tensors:
            w, g, packed, u = self._coming(i, config)
            self.operands.store_state(i, packed)
            for total, x, y in zip(sums, (w, g, u, w), (w, g, u, u), strict=True):
                self._sum(i, total, x, y)

    def _scale_update(
        self, config: StepConfig, rule: LayerRule, lr: Tensor, tensors: list[int], sums: LayerStats
    ) -> None:
        """Ask the rule for a and b, then ``w <- a*w + b*u``."""
        d = self.spec.direction
        skip = self._skips(config, sums)
        memory, whole = self._memory(rule, lr)
        constant = torch.tensor(self.spec.table.start_radius, dtype=lr.dtype, device=lr.device)
        of_layers = Layers(memory, whole, constant, self._layer_steps(lr))
        verdict = decide(rule, config, sums, lr, of_layers)
        if rule.latches or rule.averages:
            here = whole if rule.latches else self._take_part(tensors, skip)
            self._remember(rule, here & ~skip, verdict.memory)
        a, b, seen, scale = verdict.a, verdict.b, verdict.seen, verdict.scale
        for i in tensors:
            w, _, g = self.operands.load(i, config)
            u = d.direction(
                g, self.operands.state(i), d.scalars(config.values[DIRECTION:], self.steps[i])
            )
            skipped = self.spec.table.spread(i, skip, w)
            self.operands.store(i, w, u, a, b, skipped, self.steps[i])
        self._finish(tensors, seen, scale.scale, lr * scale.scale, scale.a, scale.b, skip)

    def directions(self, config: StepConfig, tensors: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """(g with L2 decay, u) of tensors, as a step in update order will form them."""
        self.steps = {i: self.operands.coming_step(i) for i in self.active}
        found = []
        for i in tensors:
            _, g, _, u = self._coming(i, config)
            found.append((g, u))
        return found

    def _coming(
        self, i: int, config: StepConfig
    ) -> tuple[Tensor, Tensor, list[codes.Packed], Tensor]:
        """Weights, gradient with L2 decay, new state as stored and step of an update rule."""
        d = self.spec.direction
        w, g0, g = self.operands.load(i, config)
        c = d.scalars(config.values[DIRECTION:], self.steps[i])
        old = self.operands.state(i)
        new = d.advance(g, old, c)
        if config.skips:  # the state of an element with a bad gradient stays
            good = torch.isfinite(g0)
            new = tuple(torch.where(good, n, o) for o, n in zip(old, new, strict=True))
        packed = self.operands.pack(i, new)
        return w, g, packed, d.direction(g, self.operands.unpack(i, packed), c)

    # -- per layer ----------------------------------------------------------------------------

    def _zeros(self) -> LayerStats:
        table = self.spec.table
        zero = torch.zeros(len(table.layers), dtype=torch.float64, device=table.device)
        return LayerStats(*(zero.clone() for _ in range(4)))

    def _sum(self, i: int, total: Tensor, x: Tensor, y: Tensor) -> None:
        """Add ``sum(x*y)`` of each part of tensor i to its layer."""
        self.spec.table.sum(i, x.double() * y.double(), total)

    def _layer_lr(self, config: StepConfig) -> Tensor:
        """Rate of each layer: lr, its lr_scale, the direction's own decay at its first tensor."""
        table, d = self.spec.table, self.spec.direction
        lr = torch.tensor(table.lr_scale, dtype=torch.float64, device=table.device)
        of_group = config.get(LR)
        lr = lr * (of_group.double().reshape(()) if isinstance(of_group, Tensor) else of_group)
        return lr * d.rate(config.values[DIRECTION:], self._layer_steps(lr))

    def _layer_steps(self, like: Tensor) -> Tensor:
        """Number of each layer's coming step: that of its first tensor."""
        steps = torch.ones_like(like)
        for i in reversed(self.active):
            for span in self.spec.table.parts[i]:
                steps[span.layer] = self.steps[i]
        return steps

    def _take_part(self, tensors: list[int], like: Tensor) -> Tensor:
        """Whether each layer has a tensor that takes part."""
        found = torch.zeros_like(like)
        for i in tensors:
            for span in self.spec.table.parts[i]:
                found[span.layer] = True
        return found

    def _skips(self, config: StepConfig, sums: Sequence[Tensor]) -> Tensor:
        """Layers to leave alone: those with a sum that is not finite."""
        if not config.skips:
            return torch.zeros_like(sums[0], dtype=torch.bool)
        return ~torch.stack([torch.isfinite(s) for s in sums]).all(0)

    def _leaders(self, rule: LayerRule) -> list[tuple[int, int, int]]:
        return self.spec.table.leaders(self.spec.states) if rule.memory_key else []

    def _memory(self, rule: LayerRule, like: Tensor) -> tuple[Tensor, Tensor]:
        """Memory of each layer (0: none), and whether all of the layer takes part."""
        memory, whole = torch.zeros_like(like), torch.ones_like(like, dtype=torch.bool)
        for layer, i, k in self._leaders(rule):
            memory[layer] = self.operands.state_dict(i)[str(rule.memory_key)][k].clone()
        for i in set(range(len(self.spec.table.params))) - set(self.active):
            for span in self.spec.table.parts[i]:
                whole[span.layer] = False
        return memory, whole

    def _remember(self, rule: LayerRule, where: Tensor, value: Tensor) -> None:
        for layer, i, k in self._leaders(rule):
            stored = self.operands.state_dict(i)[str(rule.memory_key)]
            stored[k] = torch.where(where[layer], value[layer], stored[k])

    def _finish(
        self,
        tensors: list[int],
        seen: LayerStats,
        scale: Tensor,
        lr: Tensor,
        a: Tensor,
        b: Tensor,
        skip: Tensor,
    ) -> None:
        """Advance the step counts and write the layers' row of statistics."""
        took_part = self._take_part(tensors, skip)
        for i in tensors:
            skipped = torch.stack([skip[s.layer] for s in self.spec.table.parts[i]]).all()
            self.operands.state_dict(i)["step"].add_(~skipped)
        stats = self.spec.stats
        rows = torch.stack([*seen, scale, lr, a, b], 1).detach()
        stats[:, :-1] = torch.where((took_part & ~skip).unsqueeze(1), rows, stats[:, :-1])
        stats[:, -1] += skip & took_part
