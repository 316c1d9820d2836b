"""Steps of sharded parameters: each process its part, with the sums of whole layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _C, shards
from .backends import COLUMNS, Backend, Hyper, Plan, PlanSpec
from .layers import LayerTable, Span
from .precision import splitmix64

#: columns that a gradient rule knows after its second pass, of this process's part
_OF_STEP = [COLUMNS.index(c) for c in ("ww", "uu", "wu")]


def plan(backend: Backend, spec: PlanSpec) -> Plan:
    """Plan for a supported case, whose parameters may be DTensors."""
    sharded = any(map(shards.is_sharded, spec.table.params))
    return ShardedPlan(backend, spec) if sharded else backend.plan(spec)


def step(steps: Sequence[tuple[Plan, Hyper]]) -> None:
    """Step plans side by side: one all-reduce for each process group in which layers lie."""
    measured = []
    for plan, h in steps:
        if isinstance(plan, ShardedPlan) and plan.measures(h):
            measured.append((plan, h, plan.measure(h)))
        else:
            plan.step(h)
    _reduce([(plan, sums) for plan, _, sums in measured])
    for plan, h, sums in measured:
        plan.apply(h, sums)


def norms(steps: Sequence[tuple[Plan, Hyper]]) -> list[Tensor]:
    """Sums of squares of the gradients of each plan's layers, over all processes."""
    sums = [plan.norms(h) for plan, h in steps]
    plans = [plan for plan, _ in steps]
    _reduce(
        [
            (plan, x[:, None])
            for plan, x in zip(plans, sums, strict=True)
            if isinstance(plan, ShardedPlan)
        ]
    )
    return sums


def whole(plans: Sequence[Plan], stats: Sequence[Tensor]) -> list[Tensor]:
    """Statistics of whole layers; those of gradient rules are summed over processes here."""
    answer = list(stats)
    parts = []
    for k, plan in enumerate(plans):
        if isinstance(plan, ShardedPlan) and not plan.update:
            answer[k] = stats[k].clone()
            parts.append((plan, answer[k], answer[k][:, _OF_STEP]))
    _reduce([(plan, part) for plan, _, part in parts])
    for _, to, part in parts:
        to[:, _OF_STEP] = part
    return answer


def _reduce(sums: Sequence[tuple[ShardedPlan, Tensor]]) -> None:
    """Sum [layers, k] of plans over processes, in place: one message a process group.

    A layer that is spread over several groups (a mesh of several dimensions) is summed over one
    after another, which comes out the same, to the bit, wherever it is held.
    """
    groups: dict[str, Any] = {}
    for plan, _ in sums:
        groups |= plan.groups
    for name, group in groups.items():
        places = [(x, plan.within[name]) for plan, x in sums if name in plan.groups]
        parts = [x[at] for x, at in places]
        buffer = torch.cat([part.flatten() for part in parts])
        buffer = buffer.to(_device(group, buffer))
        dist.all_reduce(buffer, group=group)
        totals = buffer.split([part.numel() for part in parts])
        for (x, at), total in zip(places, totals, strict=True):
            x[at] = total.view(-1, x.shape[1]).to(x.device)


def _device(group: Any, x: Tensor) -> torch.device:
    """Where a group takes a tensor from: where it is, or, if it is offloaded, the group's own."""
    devices: list[torch.device] = group._device_types
    return x.device if x.device.type in {d.type for d in devices} else devices[0]


def _local_state(p: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """State of the part of p that lies here; parts round with random bits of their own."""
    local = {key: shards.local_part(value) for key, value in state.items()}
    if "rounding_seed" in local and shards.index(p):
        number = torch.tensor(shards.index(p))
        local["rounding_seed"] = splitmix64(local["rounding_seed"], number)
    return local


class ShardedPlan:
    """A plan over the local parts, with a sum over processes between its two halves.

    Every process takes part in every step, with empty shards too. The table has a row for each
    way in which tensors of a layer are spread over processes; where those are several, what all
    processes of a group hold is counted by each of them in part.
    """

    traceable = False

    def __init__(self, backend: Backend, spec: PlanSpec) -> None:
        self.spec = spec
        self.update = spec.rule is not None and spec.rule.order == "update"
        params, spans = spec.table.params, spec.table.spans
        self._local = [shards.local_part(p) for p in params]
        self._known = [None if s is None else _C.Snapshot(s) for s in spec.states]
        of_tensors = [shards.groups(p) for p in params]
        of_layers: list[dict[str, Any]] = [{} for _ in spec.table.layers]
        rows: dict[tuple[int, tuple[str, ...]], int] = {}
        for span in spans:
            of_layers[span.layer] |= of_tensors[span.tensor]
            rows.setdefault((span.layer, tuple(of_tensors[span.tensor])), len(rows))
        self.groups: dict[str, Any] = functools.reduce(dict.__or__, of_layers, {})

        self._mixed = len(rows) > len(of_layers)
        device = spec.table.device
        self._layer_of = torch.tensor([layer for layer, _ in rows], device=device)
        copies = [
            [g.size() for name, g in of_layers[layer].items() if name not in names]
            for layer, names in rows
        ]
        shares = [functools.reduce(lambda x, n: x / n, sizes, 1.0) for sizes in copies]
        self._shares = torch.tensor(shares, dtype=torch.float64, device=device)[:, None]
        #: by process group, the layers that are spread over it
        self.within: dict[str, slice | Tensor] = {}
        for name in self.groups:
            inside = torch.tensor([name in groups for groups in of_layers])
            everything = bool(inside.all())
            self.within[name] = slice(None) if everything else inside.nonzero().flatten().to(device)

        local_spans = []
        for i, parts in enumerate(spec.table.parts):
            ranges = shards.local_rows(params[i], parts)
            for (begin, end), span in zip(ranges, parts, strict=True):
                row = rows[span.layer, tuple(of_tensors[i])]
                local_spans.append(Span(i, begin, end, row))
        layers = [layer for layer, _ in rows]
        table = LayerTable(
            self._local,
            spec.table.names,
            local_spans,
            [spec.table.layers[k] for k in layers],
            [spec.table.ruled[k] for k in layers],
            [spec.table.lr_scale[k] for k in layers],
        )
        states = [
            None if s is None else _local_state(p, s)
            for p, s in zip(params, spec.states, strict=True)
        ]
        stats = spec.stats[self._layer_of] if self._mixed else spec.stats
        self._plan = backend.plan(spec._replace(table=table, states=states, stats=stats))

    def measures(self, h: Hyper) -> bool:
        """Whether there are sums to take."""
        return self.spec.rule is not None or h.skip

    def prepare(self) -> bool:
        """Read gradients and data pointers afresh."""
        for p, local, state, known in zip(
            self.spec.table.params, self._local, self.spec.states, self._known, strict=True
        ):
            if p is local:
                continue
            now: Tensor = p._local_tensor  # type: ignore[attr-defined]
            moved = now.data_ptr() != local.data_ptr() or now.shape != local.shape
            if moved or not (state is None or known is None or known.matches(state)):
                return False
            local.grad = shards.local_gradient(p)
        return self._plan.prepare()

    def norms(self, h: Hyper) -> Tensor:
        """Of this process's part."""
        return self._of_layers(self._plan.norms(h)[:, None])[:, 0]

    def measure(self, h: Hyper) -> Tensor:
        """Of this process's part."""
        return self._of_layers(self._plan.measure(h))

    def apply(self, h: Hyper, sums: Tensor) -> None:
        """The rest of the step, with the sums of whole layers."""
        self._plan.apply(h, sums[self._layer_of] if self._mixed else sums)
        self._finish()

    def step(self, h: Hyper) -> None:
        """One step, with a message of its own."""
        if self.measures(h):
            step([(self, h)])
        else:
            self._plan.step(h)
            self._finish()

    def refresh(self, h: Hyper) -> None:
        """Of this process's part."""
        self._plan.refresh(h)

    def _of_layers(self, sums: Tensor) -> Tensor:
        """From rows of the table to layers."""
        if not self._mixed:
            return sums
        total = sums.new_zeros(len(self.spec.table.layers), sums.shape[1])
        return total.index_add_(0, self._layer_of, sums * self._shares)

    def _finish(self) -> None:
        """Let go of the gradients; tell autograd and the layers' statistics what changed."""
        changed = []
        for p, local in zip(self.spec.table.params, self._local, strict=True):
            if p is not local and local.grad is not None:
                changed.append(p)
                local.grad = None
        torch.autograd.graph.increment_version(changed)
        if self._mixed:
            stats = self._plan.spec.stats
            self.spec.stats[self._layer_of] = stats
            if not self.update:
                self.spec.stats[:, _OF_STEP] = self._of_layers(stats[:, _OF_STEP])
