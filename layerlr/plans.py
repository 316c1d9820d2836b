"""The cache of plans: what an optimizer's param groups were turned into, and whether it still fits.

A plan is built once and stepped many times. It is built again when its group, the parameters or the
optimizer's state are no longer what it was built from.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from . import _C, advice, backends, checks, codes, devices, options, plain_lr, rules, state
from .backends import COLUMNS, PlanSpec, StepConfig
from .backends.config import DIRECTION, RULE
from .group_key import group_key
from .group_plans import GroupPlans, TablePlan, every_plan, make_plan
from .layer_table import LayerTable
from .layers import build_tables, set_lr_scale
from .precision import of as precision_of

if TYPE_CHECKING:
    from .estimators import Layers
    from .optimizer import LayerwiseOptimizer


class PlanCache:
    """The plans of every param group of one optimizer, in order.

    The optimizer owns its cache, which refers to it weakly: the two form no cycle.
    """

    def __init__(self, optimizer: LayerwiseOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._snapshot: _C.Snapshot | None = None  # of optimizer.state, as the plans know it
        self._said: set[str] = set()
        self.groups: list[GroupPlans] = []

    def __iter__(self) -> Iterator[GroupPlans]:
        return iter(self.groups)

    @property
    def optimizer(self) -> LayerwiseOptimizer:
        """The optimizer whose plans these are."""
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    # -- plans that fit ------------------------------------------------------------------------

    def fitting(self, index: int) -> GroupPlans:
        """Plans of a param group as it stands."""
        optimizer = self.optimizer
        self._check_state(optimizer)
        return self._fitting(optimizer, index)

    def every(self) -> list[GroupPlans]:
        """Plans of all param groups as they stand."""
        optimizer = self.optimizer
        self._check_state(optimizer)
        return [self._fitting(optimizer, index) for index in range(len(optimizer.param_groups))]

    def prepared(
        self,
        wanted: Callable[[GroupPlans], bool] = every_plan,
        among: list[GroupPlans] | None = None,
    ) -> list[GroupPlans]:
        """Plans of all param groups, which have read and checked the gradients of a step.

        Where only some are ``wanted``, those. ``among``: what `every` has said within this step;
        plans that are out of date are replaced in it.

        Raises
        ------
        RuntimeError
            For a gradient that cannot be used, naming its parameter.
        """
        ready = self.every() if among is None else among
        chosen = []
        for index, plans in enumerate(ready):
            if not wanted(plans):
                continue
            if not plans.prepare():
                plans = ready[index] = self.rebuild(index)
                if not plans.prepare():
                    raise RuntimeError("optimizer.state changed while a step was prepared")
            chosen.append(plans)
        return chosen

    def config(self, plans: GroupPlans) -> StepConfig:
        """What a step of a group reads afresh.

        Raises
        ------
        ValueError
            For a hyper-parameter of the group that is no number any more, naming it.
        """
        group = plans.group
        try:
            config = self.optimizer.numbers(group)
            for place, value in enumerate(plans.direction.hyper(group), DIRECTION):
                config.values[place] = value
            rule = group["rule"]
            for place, value in enumerate(rule.hyper_of(group) if rule is not None else (), RULE):
                config.values[place] = value
        except (TypeError, ValueError):
            checks.hyper_parameters(group, self.optimizer.defaults, self.groups.index(plans))
            raise
        if group.get("reference_lr") is not None or callable(group["adapt"]):
            advice.give_of_step(self._said, group)
        return config

    def say_once(self, kind: str, message: str) -> None:
        """Warn, unless something of the kind was said of this optimizer before."""
        advice.once(self._said, kind, message)

    def take_as_said(self, keys: Iterable[str]) -> None:
        """Speak of these keys of groups no more: they were chosen, or are a state dict's."""
        self._said.update(map(advice.key_of, keys))

    def unfit(self) -> Iterator[int]:
        """Numbers of the groups that have no plans, or plans of another step."""
        optimizer = self.optimizer
        self._check_state(optimizer)
        for index in range(len(optimizer.param_groups)):
            if not self._fits(optimizer, index):
                yield index

    # -- building ------------------------------------------------------------------------------

    def rebuild(self, index: int) -> GroupPlans:
        """Build the plans of a group, the next one's that has none included."""
        self.groups[index : index + 1] = [self._build(index)]
        return self.groups[index]

    def rebuild_all(self) -> None:
        """Build all plans, for a state that was read; if that fails, nothing has changed."""
        before, self._snapshot = self._snapshot, None
        try:
            self.groups = [self._build(i) for i in range(len(self.optimizer.param_groups))]
        except Exception:
            self._snapshot = before
            raise

    def check_use(self, forgotten: bool) -> None:
        """Refuse a constructor's ``plain_lr`` without a rule; warn of what nothing follows.

        ``forgotten``: no rule was given, not even None.
        """
        optimizer = self.optimizer
        plain_lr.check_use(optimizer.defaults["plain_lr"], optimizer.param_groups)
        tables = [table for plans in self.groups for table in plans.tables]
        frozen = any(not p.requires_grad for plans in self.groups for p in plans.params)
        advice.give_of_all(
            optimizer.param_groups,
            governed=any(any(t.table.ruled) for t in tables),
            forgotten=forgotten,
            coded=frozen
            or any(
                codes.is_coded(state[key])
                for plans in self.groups
                for of_table in plans.tables
                for state in filter(None, of_table.states)
                for key in plans.direction.states
            ),
            held=any(t.plan is not None and t.plan.spec.precision for t in tables),
        )

    def release(self) -> None:
        """Let go of the plans and of their memory; statistics stay."""
        for plans in self.groups:
            plans.release()

    def _check_state(self, optimizer: LayerwiseOptimizer) -> None:
        """Expire every plan if ``optimizer.state`` is no longer what they were built from."""
        if self._snapshot is not None and not self._snapshot.matches(optimizer.state):
            for plans in self.groups:
                plans.expire()
            self._snapshot = None

    def _fitting(self, optimizer: LayerwiseOptimizer, index: int) -> GroupPlans:
        while index >= len(self.groups):  # groups that were appended by hand
            self.rebuild(len(self.groups))
        old = self.groups[index]
        if self._fits(optimizer, index):
            return old
        group = optimizer.param_groups[index]
        key = group_key(optimizer, group)
        if old.fits_but_for_rates(key, group["params"]) and all(t.fits() for t in old.tables):
            return self._rescale(old, index)
        new = self.rebuild(index)
        if {v.rule.name for v in new.views} - {v.rule.name for v in old.views}:
            _estimate_anew(new)  # another rule's numbers mean something else
        return new

    def _fits(self, optimizer: LayerwiseOptimizer, index: int) -> bool:
        """Whether a group has plans of the step that it asks for."""
        if index >= len(self.groups):
            return False
        plans = self.groups[index]
        group = plans.group = optimizer.param_groups[index]  # perhaps another dict by now
        return plans.fits(group_key(optimizer, group), group["params"])

    def _rescale(self, old: GroupPlans, index: int) -> GroupPlans:
        """Plans over the tables that there are, at other rates: schedules write ``lr_factor``."""
        optimizer = self.optimizer
        group = optimizer.param_groups[index]
        _check_capture(group, index)
        tables = [t for t in old.tables if t.plan is not None]
        set_lr_scale([t.table for t in tables], group, optimizer.plain_ratio(group))
        plans = [make_plan(backends.BACKENDS[t.backend], t.plan.spec) for t in tables if t.plan]
        tables = [dataclasses.replace(t, plan=p) for t, p in zip(tables, plans, strict=True)]
        key = group_key(optimizer, group)
        self.groups[index] = dataclasses.replace(old, group=group, key=key, tables=tables)
        return self.groups[index]

    def _build(self, index: int) -> GroupPlans:
        """Tables, state and plans of a group; statistics of unchanged layers are carried over."""
        optimizer = self.optimizer
        group = optimizer.param_groups[index]
        _check_capture(group, index)
        group["rule"] = optimizer.rule(group)
        options.check(group, index)
        checks.flags_of_group(group, index)
        checks.params(group, index)
        checks.corrected_decay(group, index, optimizer.decoupled(group))
        direction = optimizer.direction(group)
        first = sum(len(g["params"]) for g in optimizer.param_groups[:index])
        old = self.groups[index].tables if index < len(self.groups) else []
        carried = {_place(t.table): t.stats for t in old}
        self._check_state(optimizer)
        rated = _rated(group, optimizer.state)
        tables = []
        for table in build_tables(group, index, optimizer.plain_ratio(group)):
            states = state.complete_table(optimizer.state, table, group, direction, first)
            stats = carried.get(_place(table))
            if stats is None or stats.device != table.device:  # swapped for tensors elsewhere
                shape = len(table.layers), len(COLUMNS)
                stats = torch.zeros(shape, dtype=torch.float64, device=table.device)
            precision = precision_of(table.params, group["precision"])
            spec = PlanSpec(
                table, direction, group["rule"], states, stats, group["differentiable"], precision
            )
            backend = backends.choose(optimizer.backend, spec)
            plan, view = make_plan(backend, spec), _view(spec)
            known = list(map(_C.Known, table.params, states))
            tables.append(TablePlan(table, states, backend.name, stats, plan, view, known))
        self._snapshot = _C.Snapshot(optimizer.state)
        governed = any(any(t.table.ruled) for t in tables)
        owner, defaults = type(optimizer), optimizer.defaults
        advice.give(self._said, owner, group, defaults, direction, governed)
        key = group_key(optimizer, group)
        built = GroupPlans(group, key, list(group["params"]), direction, tables)
        if _rated(group, optimizer.state) - rated:
            _estimate_anew(built)  # a layer came that has no rate yet
        return built


def _rated(group: dict[str, Any], of: Mapping[torch.Tensor, dict[str, Any]]) -> set[int]:
    """Parameters that have a rate, where the rule has estimated some.

    A rule that wants second derivatives waits for the backward pass in which it asks for them.
    """
    rule = group["rule"]
    if not rules.is_estimated(rule) or rule.second_order or not group.get("estimated"):
        return set()
    return {id(p) for p in group["params"] if rule.memory_key in of.get(p, ())}


def _estimate_anew(plans: GroupPlans) -> None:
    plans.group["estimated"] = 0
    for view in plans.views:
        view.restart()


def _check_capture(group: dict[str, Any], index: int) -> None:
    if any(map(devices.capturing, {p.device for p in group["params"]})):
        raise RuntimeError(
            f"param group {index} is new or has changed: take a step before capturing one in a "
            "CUDA graph"
        )


def _place(table: LayerTable) -> tuple[Any, ...]:
    """What makes a table's layers the same as another's, whatever their names."""
    return table.device, tuple(map(id, table.params)), tuple(table.spans)


def _view(spec: PlanSpec) -> Layers | None:
    """What an estimator sees of a table, where the rule has one."""
    if not isinstance(spec.rule, rules.Estimated):
        return None
    from .estimators import Layers  # which optimizers without such a rule never import

    return Layers(spec)
