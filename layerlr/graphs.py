"""Steps in CUDA graphs: what cannot be captured, and what replays read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import devices, rules
from .group_plans import GroupPlans, every_plan
from .layers import names_of
from .plans import PlanCache


class CapturedSteps:
    """The steps of one optimizer that CUDA graphs have captured."""

    def __init__(self, plans: PlanCache) -> None:
        self._cache = plans
        self.plans: list[GroupPlans] = []  # a graph does not keep what it reads alive

    def prepared(
        self,
        wanted: Callable[[GroupPlans], bool] = every_plan,
        among: list[GroupPlans] | None = None,
    ) -> list[GroupPlans]:
        """`PlanCache.prepared`, of a step that may be about to be captured."""
        graph = self._capturing()
        if graph:
            for index, group in enumerate(self._cache.optimizer.param_groups):
                _check_capture(group, index)
        ready = self._cache.prepared(wanted, among)
        if graph:
            self.plans += [plans for plans in ready if plans not in self.plans]
        return ready

    def refresh(self) -> None:
        """Bring the numbers of all groups to the device; see `LayerwiseOptimizer.refresh`."""
        cache = self._cache
        if self._capturing():
            raise RuntimeError("call refresh() before the capture of a CUDA graph, not within it")
        strange = {k for k, plans in enumerate(cache) if self.plans and plans not in self.plans}
        strange.update(cache.unfit())
        if strange:
            raise RuntimeError(
                f"param group {min(strange)} is new or has changed since its step was captured, "
                "and no replay can follow: take a step outside of the graph, and capture again"
            )
        for plans in cache:
            for plan in plans.plans:
                plan.refresh(cache.config(plans))

    def release(self) -> None:
        """Let go of all plans."""
        self._cache.release()
        self.plans = []

    def _capturing(self) -> bool:
        for plans in self._cache.groups:
            for device in plans.devices:
                if devices.capturing(device):
                    return True
        return False


def check_capturable(groups: list[dict[str, Any]]) -> None:
    """Refuse ``capturable=True`` where nothing can be captured, in torch's words."""
    for group in groups:
        if group.get("capturable") and any(p.device.type == "cpu" for p in group["params"]):
            raise RuntimeError(
                "If capturable=True, params and state_steps must be on supported devices: "
                "['cuda', 'xpu', 'hpu', 'privateuseone', 'xla']."
            )


def _check_capture(group: dict[str, Any], index: int) -> None:
    """Refuse to capture a step that replays could not take whole, saying why."""
    for name, p in zip(names_of(group, index), group["params"], strict=True):
        if not devices.capturing(p.device):
            raise RuntimeError(
                f"parameter {name!r} is on {p.device}, where nothing is captured: a CUDA graph of "
                "the step would not update it; give it to an optimizer of its own"
            )
        if p.requires_grad and p.grad is None:
            raise RuntimeError(
                f"parameter {name!r} has no gradient, and the CUDA graph that is captured would "
                "never update it: capture a step after backward(), or within the graph, or freeze "
                "the parameter with requires_grad_(False)"
            )
    rule = rules.resolve(group["rule"])
    if isinstance(rule, rules.Estimated):
        raise RuntimeError(
            f"the step of param group {index} cannot be captured in a CUDA graph: its rule looks "
            "at the model"
        )
