"""The layers of one plan, as an estimator sees them before a step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layerlr import devices
from layerlr.backends import PlanSpec, StepConfig
from layerlr.backends.base import accumulator
from layerlr.backends.reference import ReferencePlan
from layerlr.layers import rows
from layerlr.rules import Estimated


class Layers:
    """The governed layers of a plan: their memory, and the coming step.

    Values of layers are float64 tensors with an entry for each row of the plan's table, parameters
    outside the rule included. Nothing here waits for the device.
    """

    def __init__(self, spec: PlanSpec) -> None:
        assert isinstance(spec.rule, Estimated)
        self.spec, self.rule, self.table = spec, spec.rule, spec.table
        self._plan = ReferencePlan(spec)
        leaders = self.table.leaders(spec.states)
        self._leading = sorted({i for _, i, _ in leaders})
        sizes = [len(self.table.parts[i]) for i in self._leading]
        first = dict(zip(self._leading, itertools.accumulate([0, *sizes]), strict=False))
        self._rows = torch.tensor([layer for layer, _, _ in leaders], device=self.device)
        self._places = torch.tensor([first[i] + k for _, i, k in leaders], device=self.device)
        table = self.table
        for p, name, parts in zip(table.params, table.names, table.parts, strict=True):
            if p.is_complex() and table.ruled[parts[0].layer]:
                raise ValueError(
                    f"rule {self.rule.name!r} does not support complex parameters ({name!r}): "
                    "leave it out with adapt=, or use another rule"
                )

    def begin(self, step: int, config: StepConfig) -> None:
        """Look at the gradients of the coming step, the step-th since the rule was set."""
        self.step, self.config = step, config
        self._plan.prepare()
        ruled, parts = self.table.ruled, self.table.parts
        #: tensors that take part: governed, with a gradient
        self.active = [i for i in self._plan.active if ruled[parts[i][0].layer]]
        self.__dict__.pop("moves", None)

    @property
    def device(self) -> torch.device:
        """Of the parameters and of all values here."""
        return self.table.device

    def restart(self) -> None:
        """Set the memory, which another rule has written, to its first values."""
        for state in self.spec.states:
            for key, value in self.rule.memory.items():
                if state is not None and key in state:
                    state[key].fill_(value)

    @functools.cached_property
    def moves(self) -> list[tuple[Tensor, Tensor]]:
        """(gradient with L2 decay, u) of what takes part, as the coming step will form them."""
        found = self._plan.directions(self.config, self.active)
        return [(g.detach(), u.detach()) for g, u in found]

    def scaled(self, values: Tensor, xs: list[Tensor]) -> list[Tensor]:
        """Each x times the value of its layer."""
        spread = self.table.spread
        return [x * spread(i, values, x) for i, x in zip(self.active, xs, strict=True)]

    def read(self, key: str) -> Tensor:
        """The numbers of the layers under a key of ``rule.memory``."""
        values = torch.zeros(len(self.table.layers), dtype=torch.float64, device=self.device)
        if self._leading:
            stored = torch.cat([self._state(i)[key] for i in self._leading])
            values[self._rows] = stored[self._places]
        return values

    def write(self, key: str, values: Tensor) -> None:
        """Write the numbers of the layers."""
        if not self._leading:
            return
        stored = [self._state(i)[key] for i in self._leading]
        joined = torch.cat(stored)
        joined[self._places] = values[self._rows]
        torch._foreach_copy_(stored, list(joined.split([len(s) for s in stored])))

    def _state(self, i: int) -> Mapping[str, Any]:
        state = self.spec.states[i]
        assert state is not None
        return state


class LayerSet:
    """All layers that follow one rule, over several groups and devices.

    Values of layers are concatenated, on the device of the first ones; lists of tensors run over
    the tensors that take part.
    """

    def __init__(self, rule: Estimated, views: Sequence[Layers]) -> None:
        self.rule, self.views = rule, views
        self.device, self.step = views[0].device, views[0].step

    def __len__(self) -> int:
        return sum(len(view.table.layers) for view in self.views)

    def params(self) -> list[Tensor]:
        """The tensors that take part."""
        return [view.table.params[i] for view in self.views for i in view.active]

    def names(self) -> list[str]:
        """Their names."""
        return [view.table.names[i] for view in self.views for i in view.active]

    @functools.cached_property
    def gradients(self) -> list[Tensor]:
        """As the coming step sees them, with L2 decay; ascent where the loss is maximised."""
        return [g for view in self.views for g, _ in view.moves]

    @functools.cached_property
    def steps(self) -> list[Tensor]:
        """What the coming step subtracts at a rate of 1."""
        return [u for view in self.views for _, u in view.moves]

    def dot(self, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
        """Sum of x*y over each layer; xs and ys in the order of `params`."""
        total, of = self._zeros(), dict(zip(self.params(), zip(xs, ys, strict=True), strict=True))
        for p, begin, end, layer in self.parts():
            x, y = of[p]
            if p.dim() and end - begin < p.shape[0]:
                x, y = x[begin:end], y[begin:end]
            product = x.to(accumulator(x.dtype)) * y.to(accumulator(y.dtype))
            total[layer] = total[layer] + product.sum(dtype=torch.float64).to(self.device)
        return torch.stack(total)

    def mean(self, values: Sequence[Tensor]) -> Tensor:
        """Mean over each layer's elements of a number of each tensor."""
        total, of = self._zeros(), dict(zip(self.params(), values, strict=True))
        for p, begin, end, layer in self.parts():
            total[layer] = total[layer] + _elements(p, begin, end) * of[p].to(self.device)
        return torch.stack(total) / self.count()

    def count(self) -> Tensor:
        """Number of elements that take part in each layer."""
        count = [0.0] * len(self)
        for p, begin, end, layer in self.parts():
            count[layer] += _elements(p, begin, end)
        return devices.numbers(count, torch.float64, self.device)

    def scaled(self, values: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
        """Each x times the value of its layer."""
        triples = zip(self.views, self.split(values), self._by_view(xs), strict=True)
        return [y for view, value, x in triples for y in view.scaled(value, x)]

    def parts(self) -> list[tuple[Tensor, int, int, int]]:
        """(tensor, first row, last row, layer) of each part of the tensors that take part."""
        found, first = [], 0
        for view in self.views:
            for i in view.active:
                for span in view.table.parts[i]:
                    found.append((view.table.params[i], span.begin, span.end, first + span.layer))
            first += len(view.table.layers)
        return found

    def of_groups(self, value: Callable[[StepConfig], float]) -> Tensor:
        """A hyper-parameter of each layer's group."""
        sizes = [len(view.table.layers) for view in self.views]
        values = [value(view.config) for view in self.views]
        listed = [v for v, n in zip(values, sizes, strict=True) for _ in range(n)]
        return devices.numbers(listed, torch.float64, self.device)

    def read(self, key: str) -> Tensor:
        """The numbers of the layers under a key of ``rule.memory``."""
        return self.join([view.read(key) for view in self.views])

    def write(self, key: str, values: Tensor) -> None:
        """Write the numbers of the layers."""
        for view, value in zip(self.views, self.split(values), strict=True):
            view.write(key, value)

    def average(self, value: Tensor, good: Tensor) -> Tensor:
        """The running mean with ``value``, where that is good; NaN before the first one."""
        new = {"estimate": torch.where(good, value, 0.0), "estimate_weight": torch.ones_like(value)}
        means = []
        for key, x in new.items():
            stored = self.read(key)
            mean = self.rule.ema * stored + (1.0 - self.rule.ema) * x
            means.append(torch.where(good, mean, stored))
            self.write(key, means[-1])
        return means[0] / means[1]

    def join(self, values: Sequence[Tensor]) -> Tensor:
        """Values of each view's layers, one after the other."""
        return torch.cat([v.to(self.device) for v in values])

    def split(self, values: Tensor) -> list[Tensor]:
        """The reverse of `join`."""
        parts = values.split([len(view.table.layers) for view in self.views])
        return [part.to(view.device) for view, part in zip(self.views, parts, strict=True)]

    def _zeros(self) -> list[Tensor]:
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        return [zero] * len(self)

    def _by_view(self, xs: Sequence[Tensor]) -> list[list[Tensor]]:
        rest = iter(xs)
        return [[next(rest) for _ in view.active] for view in self.views]


def _elements(p: Tensor, begin: int, end: int) -> int:
    return p.numel() * (end - begin) // max(rows(p), 1)


def generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Random numbers of one step: a function of seed and step alone."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)
