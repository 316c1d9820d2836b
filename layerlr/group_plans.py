"""The plans of one param group, and what they were built from."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import _C
from .backends import Backend, Plan, PlanSpec
from .directions import Direction
from .dtensor import is_sharded
from .group_key import GroupKey
from .layer_table import LayerTable
from .sharded_plan import ShardedPlan

if TYPE_CHECKING:
    from .estimators import Layers


@dataclasses.dataclass(eq=False)
class TablePlan:
    """The plan of one table: the layers of a param group on one device."""

    table: LayerTable
    states: list[dict[str, Any] | None]  # of each of its parameters; None: frozen
    backend: str
    stats: Tensor
    plan: Plan | None  # None: released
    view: Layers | None  # of a rule that looks at the model
    known: list[_C.Known]  # what the plan was built from

    def fits(self) -> bool:
        """Whether parameters and state are what the plan was built from."""
        return all(known.fits() for known in self.known)


@dataclasses.dataclass(eq=False)
class GroupPlans:
    """The plans of one param group, and the key and parameters that they were built for."""

    group: dict[str, Any]
    key: GroupKey
    params: list[Tensor]
    direction: Direction
    tables: list[TablePlan]

    def __post_init__(self) -> None:
        #: the plan of each table; none after a release
        self.plans = [t.plan for t in self.tables if t.plan is not None]
        self.devices = {t.table.device for t in self.tables}

    @property
    def views(self) -> list[Layers]:
        """What an estimator sees of each table."""
        return [t.view for t in self.tables if t.view is not None]

    def fits(self, key: GroupKey, params: list[Tensor]) -> bool:
        """Whether the plans are those of a group with this key and these parameters."""
        return _C.same_objects(params, self.params) and key == self.key

    def fits_but_for_rates(self, key: GroupKey, params: list[Tensor]) -> bool:
        """Whether the plans differ from those of such a group by ``lr_factor`` alone."""
        return self.fits(key._replace(lr_factor=self.key.lr_factor), params)

    def prepare(self) -> bool:
        """Have every plan read its gradients; False: one of them is out of date."""
        for plan in self.plans:  # no generator: this is on every step's way
            if not plan.prepare():
                return False
        return True

    def expire(self) -> None:
        """Have the plans built again before the next step."""
        self.key = GroupKey(None, ())

    def release(self) -> None:
        """Let go of the plans and of their memory; statistics stay."""
        self.expire()
        self.plans = []
        for table in self.tables:
            table.plan = None


def every_plan(plans: GroupPlans) -> bool:
    """Whatever the plan."""
    return True


def make_plan(backend: Backend, spec: PlanSpec) -> Plan:
    """Plan for a supported case, whose parameters may be DTensors."""
    sharded = any(map(is_sharded, spec.table.params))
    return ShardedPlan(backend, spec) if sharded else backend.plan(spec)
