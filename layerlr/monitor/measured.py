"""Angles and lengths of steps that another optimizer takes, by the first pass of our engines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from layerlr import backends, devices, statistics, taken
from layerlr.backends import COLUMNS, Plan, PlanSpec
from layerlr.directions import DIRECTIONS
from layerlr.group_plans import make_plan
from layerlr.layers import Adapt, LayerKey, build_tables, names_of
from layerlr.names import of_model
from layerlr.rules import Lamb
from layerlr.sharded_plan import measure

from .cosine import moved

#: any rule that has all four sums taken; nothing is asked of it
_RULE = Lamb()


class MeasuredSteps:
    """What the weights of an optimizer's layers did between `begin` and `end`."""

    def __init__(
        self,
        optimizer: Optimizer,
        adapt: str | Adapt,
        layers: str | LayerKey,
        backend: str,
        model: nn.Module | None,
    ) -> None:
        self._optimizer = optimizer
        self._options = {"adapt": adapt, "layers": layers, "rule": _RULE}
        self._backend, self._model = backend, model
        self._key: list[Any] = []
        self._plans: list[Plan] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Copy the weights."""
        self._before = []  # of a step that failed
        self._fit()
        self._before = taken.copies(p for plan in self._plans for p in plan.spec.table.params)

    @torch.no_grad()
    def end(self) -> dict[str, Any] | None:
        """``names``, ``angle`` and ``relative``; None without `begin`, and where nothing stayed."""
        before, self._before = self._before, []
        if not before:
            return None
        with taken.as_gradients(before):
            if not all([plan.prepare() for plan in self._plans]):
                self._build()  # shards that have moved
                if not all([plan.prepare() for plan in self._plans]):
                    return None
            config = taken.config()
            sums = measure([(plan, config) for plan in self._plans])
        names = [name for plan in self._plans for name in plan.spec.table.layers]
        home = devices.home([x.device for x in sums])
        rows = torch.cat([moved(x[:, :4], home) for x in sums])
        return {"names": names, **_rates(rows)}

    def _fit(self) -> None:
        """Have plans of the parameters that train now."""
        key = [
            (p, p.requires_grad, p.dtype, p.shape, p.device, name)
            for index, group in enumerate(self._optimizer.param_groups)
            for p, name in zip(group["params"], self._names(group, index), strict=True)
        ]
        if len(key) != len(self._key) or any(
            new[0] is not old[0] or new[1:] != old[1:]
            for new, old in zip(key, self._key, strict=True)
        ):
            self._build()
            self._key = key

    def _build(self) -> None:
        self._plans = []
        for index, group in enumerate(self._optimizer.param_groups):
            named = zip(group["params"], self._names(group, index), strict=True)
            watched = [(p, name) for p, name in named if _can_be_measured(p)]
            like = {
                **self._options,
                "params": [p for p, _ in watched],
                "param_names": [name for _, name in watched],
            }
            for table in build_tables(like, index, None):
                states: list[dict[str, Any] | None] = [
                    {"step": torch.zeros((), device=p.device)} for p in table.params
                ]
                shape = len(table.layers), len(COLUMNS)
                stats = torch.zeros(shape, dtype=torch.float64, device=table.device)
                spec = PlanSpec(table, DIRECTIONS["sgd"], _RULE, states, stats, False, None)
                self._plans.append(make_plan(backends.choose(self._backend, spec), spec))

    def _names(self, group: dict[str, Any], index: int) -> list[str]:
        if self._model is None or "param_names" in group:
            return names_of(group, index)
        return of_model(self._model, group["params"], names_of(group, index))


def _can_be_measured(p: Tensor) -> bool:
    return p.requires_grad and (p.is_floating_point() or p.is_complex()) and p.dtype.itemsize > 1


def _rates(rows: Tensor) -> dict[str, Tensor]:
    """From sums over w after and u, one row a layer; 0 where there were no weights."""
    ww, _, uu, wu = rows.unbind(1)
    before = (ww + 2.0 * wu + uu).clamp(min=0.0)
    one = torch.ones_like(ww)
    angle = torch.where(before > 0, statistics.angle(ww, uu, wu, one, one), 0.0)
    return {"angle": angle, "relative": torch.where(before > 0, (uu / before).sqrt(), 0.0)}
