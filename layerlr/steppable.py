"""Parts of a param group that can step by themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from .backends import BACKENDS, Plan, PlanSpec, StepConfig
from .group_plans import GroupPlans, TablePlan, make_plan
from .layer_table import LayerTable, Span


@dataclasses.dataclass(eq=False)
class Unit:
    """Tensors and layers that hang together, and a plan of their own over the group's state.

    Its numbers are the group plan's to the bit: it runs on the same backend, sums of a layer do
    not depend on what else is in a plan, and the order of tensors is kept.
    """

    group: int
    of_table: TablePlan
    spec: PlanSpec
    layers: list[int]  # rows of the group's statistics, of which spec.stats is a view
    plan: Plan | None = None  # from the first step on
    now: tuple[int, int] = (-1, -1)  # the pass that is counted
    seen: set[int] = dataclasses.field(default_factory=set)
    expected: int = 0
    streams: list[torch.Stream] = dataclasses.field(default_factory=list)

    def complete_with(self, p: Tensor, now: tuple[int, int]) -> bool:
        """Count a parameter; whether every one that takes gradients has been counted."""
        if self.now != now:
            self.now, self.seen, self.streams = now, set(), []
            self.expected = sum(q.requires_grad for q in self.spec.table.params)
        self.seen.add(id(p))
        if p.device.type != "cpu":
            self.streams.append(torch.accelerator.current_stream(p.device))
        return len(self.seen) == self.expected

    def prepare(self) -> bool:
        """Read the gradients and check them; False: the group's plans are out of date."""
        self._join()  # before one is copied
        if self.plan is None:
            if not self.of_table.fits():
                return False
            self.plan = make_plan(BACKENDS[self.of_table.backend], self.spec)
        return self.plan.prepare()

    def step(self, config: StepConfig) -> None:
        """One step with the gradients that `prepare` read, on the current stream."""
        assert self.plan is not None
        self.plan.step(config)

    def _join(self) -> None:
        """Where gradients came in on several streams: wait for them, tell the allocator."""
        now = self.streams[-1:]
        if any(s != now[0] for s in self.streams):
            for stream in self.streams:
                now[0].wait_stream(stream)
            for p in self.spec.table.params:
                if p.grad is not None:
                    p.grad.record_stream(now[0])
        self.streams = []


def units(group: int, plans: GroupPlans) -> Iterator[Unit]:
    """The units of a param group, in the order of its tensors."""
    for of_table in plans.tables:
        assert of_table.plan is not None
        whole = of_table.plan.spec
        for tensors, layers in _components(whole.table):
            states = [whole.states[i] for i in tensors]
            rows = whole.stats[layers[0] : layers[-1] + 1]
            assert len(rows) == len(layers), "blocks of a key are layers in a row"
            table = _part(whole.table, tensors, layers)
            spec = whole._replace(table=table, states=states, stats=rows)
            yield Unit(group, of_table, spec, layers)


def _components(table: LayerTable) -> list[tuple[list[int], list[int]]]:
    """Tensors and layers, in order, of each connected component."""
    root = list(range(len(table.layers)))

    def find(layer: int) -> int:
        while root[layer] != layer:
            root[layer] = layer = root[root[layer]]
        return layer

    for spans in table.parts:
        for span in spans[1:]:
            root[find(span.layer)] = find(spans[0].layer)
    components: dict[int, tuple[list[int], list[int]]] = {}
    for i, spans in enumerate(table.parts):
        components.setdefault(find(spans[0].layer), ([], []))[0].append(i)
    for layer in range(len(table.layers)):
        components[find(layer)][1].append(layer)
    return list(components.values())


def _part(table: LayerTable, tensors: list[int], layers: list[int]) -> LayerTable:
    """The table of some tensors and of all their layers."""
    place, row = ({old: new for new, old in enumerate(taken)} for taken in (tensors, layers))
    spans = [
        Span(place[s.tensor], s.begin, s.end, row[s.layer]) for i in tensors for s in table.parts[i]
    ]
    params, names = [table.params[i] for i in tensors], [table.names[i] for i in tensors]
    return table.part(layers, params, names, spans)
