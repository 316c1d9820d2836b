"""Plans of sharded parameters: each process steps its shard, with the sums of whole layers."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C, devices, dtensor
from .backends import COLUMNS, Backend, Plan, PlanSpec, StepConfig
from .layer_table import LayerTable, Span
from .precision import splitmix64

_OF_STEP = [COLUMNS.index(c) for c in ("ww", "uu", "wu")]


def reduce(sums: Sequence[tuple[ShardedPlan, Tensor]]) -> None:
    """Sum values of layers [layers, k] over processes, in place: one message a process group.

    A layer that is spread over several groups (a mesh of several dimensions) is summed over one
    after another, which gives the same bits on every process.
    """
    groups: dict[str, Any] = {}
    for plan, _ in sums:
        groups |= plan.layout.groups
    for name, group in groups.items():
        parts = [(x, p.layout.within[name]) for p, x in sums if name in p.layout.groups]
        totals = dtensor.sum_over(group, [x[at] for x, at in parts])
        for (x, at), total in zip(parts, totals, strict=True):
            x[at] = total


def measure(steps: Sequence[tuple[Plan, StepConfig]]) -> list[Tensor]:
    """The sums that the first pass of each plan takes, over processes, where no step follows it."""
    sums = [plan.measure(config) for plan, config in steps]
    shared = zip((plan for plan, _ in steps), sums, strict=True)
    reduce([(plan, x) for plan, x in shared if isinstance(plan, ShardedPlan)])
    for plan, _ in steps:
        plan.forget()
    return sums


class ShardLayout:
    """How the layers of a table lie over processes, and the table of this process's shards.

    The table has a row for each way in which tensors of a layer are spread. Where a layer has
    several, each process of a group that holds the same values counts a share of them.

    Attributes
    ----------
    groups, within
        By name: the process groups, and the layers that are summed over each of them.
    table
        The table of this process's shards: a row for each layer and each way of being spread.
    mixed
        Whether there are more rows than layers.
    layer_of, first_row
        The layer of each row, and the first row of each layer.
    of_step
        Columns that a gradient rule knows after its second pass only. An index on the device, as
        the two above: a list would be copied there at each use, and waited for.
    parts
        How many times the row's sums are counted over all processes, each process counting its
        share.
    """

    def __init__(self, whole: LayerTable) -> None:
        of_tensors = [dtensor.groups(p) for p in whole.params]
        of_layers: list[dict[str, Any]] = [{} for _ in whole.layers]
        rows: dict[tuple[int, tuple[str, ...]], int] = {}
        for span in whole.spans:
            of_layers[span.layer] |= of_tensors[span.tensor]
            rows.setdefault((span.layer, tuple(of_tensors[span.tensor])), len(rows))
        layers = [layer for layer, _ in rows]
        self.groups: dict[str, Any] = functools.reduce(dict.__or__, of_layers, {})
        self.within: dict[str, slice | Tensor] = {}
        for name in self.groups:
            inside = torch.tensor([name in groups for groups in of_layers])
            at = inside.nonzero().flatten().to(whole.device)
            self.within[name] = slice(None) if bool(inside.all()) else at

        local = [dtensor.local_part(p) for p in whole.params]
        spans = []
        for i, of_tensor in enumerate(whole.parts):
            ranges = dtensor.local_rows(whole.params[i], of_tensor)
            for (begin, end), span in zip(ranges, of_tensor, strict=True):
                spans.append(Span(i, begin, end, rows[span.layer, tuple(of_tensors[i])]))
        self.table = whole.part(layers, local, whole.names, spans)

        self.mixed = len(rows) > len(of_layers)
        self.layer_of = torch.tensor(layers, device=whole.device)
        self.first_row = torch.tensor(
            [layers.index(k) for k in range(len(of_layers))], device=whole.device
        )
        self.of_step = torch.tensor(_OF_STEP, device=whole.device)
        shares, counted = [], [0.0] * len(of_layers)
        for layer, names in rows:
            others = (g for name, g in of_layers[layer].items() if name not in names)
            shares.append(1.0 / _processes(others))
            counted[layer] += shares[-1]
        parts = [counted[layer] * _processes(of_layers[layer].values()) for layer in layers]
        self._shares, self.parts = (
            torch.tensor(x, dtype=torch.float64, device=whole.device)[:, None]
            for x in (shares, parts)
        )

    def of_layers(self, sums: Tensor) -> Tensor:
        """From rows to layers."""
        if not self.mixed:
            return sums
        total = sums.new_zeros(len(self.first_row), sums.shape[1])
        return total.index_add_(0, self.layer_of, sums * self._shares)


def _processes(groups: Iterable[Any]) -> int:
    return functools.reduce(lambda n, group: n * int(group.size()), groups, 1)


def _local_state(p: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """State of this process's shard of p; shards round with random bits of their own."""
    local = {key: dtensor.local_part(value) for key, value in state.items()}
    if "rounding_seed" in local and dtensor.index(p):
        number = torch.tensor(dtensor.index(p))
        local["rounding_seed"] = splitmix64(local["rounding_seed"], number)
    return local


class ShardedPlan:
    """A plan over the local parts, with a sum over processes between its two halves.

    Every process takes part in every step, with empty shards too. What a gradient rule knows after
    its second pass only is summed with the next step's message.
    """

    def __init__(self, backend: Backend, spec: PlanSpec) -> None:
        self.spec = spec
        self.layout = ShardLayout(spec.table)
        self._update = spec.rule is not None and spec.rule.order == "update"
        self._known = [None if s is None else _C.Snapshot(s) for s in spec.states]
        states = [
            None if s is None else _local_state(p, s)
            for p, s in zip(spec.table.params, spec.states, strict=True)
        ]
        # statistics of the rows; those of a gradient rule are of this process's shards
        self._own = self.layout.mixed or not self._update
        self._stats = spec.stats[self.layout.layer_of] if self._own else spec.stats
        self._adopt()
        self._waiting = self._late()  # to be summed
        self._took: slice | Tensor = slice(None)  # layers that have a gradient
        self._plan = backend.plan(
            spec._replace(table=self.layout.table, states=states, stats=self._stats)
        )
        self._radii = self._places_of_radii(states)

    def measures(self, config: StepConfig) -> bool:
        """Whether there are sums to take."""
        return self.spec.rule is not None or config.skips

    def prepare(self) -> bool:
        """Read gradients and data pointers afresh."""
        table = self.spec.table
        for p, local, state, known in zip(
            table.params, self.layout.table.params, self.spec.states, self._known, strict=True
        ):
            if not (state is None or known is None or known.matches(state)):
                return False
            if p is local:
                continue
            now: Tensor = p._local_tensor  # type: ignore[attr-defined]
            if now.data_ptr() != local.data_ptr() or now.shape != local.shape:
                return False
            local.grad = dtensor.local_gradient(p)
        active = [p.grad is not None for p in table.params]
        self._took = slice(None)
        if not all(active):
            found = {s.layer for s in table.spans if active[s.tensor]}
            self._took = devices.numbers(sorted(found), torch.long, table.device)
        return self._plan.prepare()

    def norms(self, config: StepConfig) -> Tensor:
        """Sums over this process's shards; `reduce` adds those of the others."""
        return self.layout.of_layers(self._plan.norms(config)[:, None])[:, 0]

    def measure(self, config: StepConfig) -> Tensor:
        """Sums over this process's shards, and what the last step left to be summed."""
        self._adopt()
        sums = self.layout.of_layers(self._plan.measure(config))
        return sums if self._update else torch.cat([sums, self._waiting], 1)

    def apply(self, config: StepConfig, sums: Tensor) -> None:
        """The second pass, with the sums of whole layers."""
        whole, of_last = sums[:, :4].contiguous(), sums[:, 4:]
        hidden = [(x, x.clone()) for x in self._radii_of_parts()]
        for x, _ in hidden:
            x.zero_()
        self._plan.apply(config, whole[self.layout.layer_of] if self.layout.mixed else whole)
        for x, radius in hidden:
            x.copy_(radius)
        self._finish()
        if self._own:
            rows = self._stats[self.layout.first_row]
            if not self._update:
                self._waiting[self._took] = self._late()[self._took]
                rows[:, self.layout.of_step] = of_last
            self.spec.stats[self._took] = rows[self._took]

    def step(self, config: StepConfig) -> None:
        """One step, with a message of its own."""
        if self.measures(config):
            sums = self.measure(config)
            reduce([(self, sums)])
            self.apply(config, sums)
        else:
            self._plan.step(config)
            self._finish()

    def refresh(self, config: StepConfig) -> None:
        """Bring the numbers to where captured steps of this process's shards read them."""
        self._plan.refresh(config)

    def _places_of_radii(self, states: Sequence[dict[str, Any] | None]) -> list[list[Tensor]]:
        """Where rows keep the radii of each layer, if layers have several rows and a radius."""
        rule = self.spec.rule
        found: list[list[Tensor]] = []
        if self.layout.mixed and rule is not None and rule.latches:
            found = [[] for _ in self.spec.table.layers]
            for state, spans in zip(states, self.spec.table.parts, strict=True):
                for place, span in enumerate(spans):
                    if state is not None and self.spec.table.ruled[span.layer]:
                        found[span.layer].append(state[str(rule.memory_key)][place : place + 1])
        return found

    def _radii_of_parts(self) -> list[Tensor]:
        """Those of layers that lack a gradient: of a part no radius is kept, and a row is one."""
        if not self._radii:
            return []
        table = self.spec.table
        lacking = {s.layer for s in table.spans if table.params[s.tensor].grad is None}
        return [x for layer in sorted(lacking) for x in self._radii[layer]]

    def _adopt(self) -> None:
        """Copy the layers' statistics into the rows; sums are divided by how often they count."""
        if self._own:
            self._stats.copy_(self.spec.stats[self.layout.layer_of])
            if not self._update:
                self._stats[:, self.layout.of_step] /= self.layout.parts

    def _late(self) -> Tensor:
        return self.layout.of_layers(self._stats[:, self.layout.of_step])

    def forget(self) -> None:
        """Let go of the gradients."""
        for _, local in self._shards():
            local.grad = None
        self._plan.forget()

    def _finish(self) -> None:
        """Tell autograd what changed, and let go of the gradients."""
        changed = [p for p, local in self._shards() if local.grad is not None]
        torch.autograd.graph.increment_version(changed)
        self.forget()

    def _shards(self) -> list[tuple[Tensor, Tensor]]:
        """Sharded parameters and their local parts."""
        pairs = zip(self.spec.table.params, self.layout.table.params, strict=True)
        return [(p, local) for p, local in pairs if p is not local]
