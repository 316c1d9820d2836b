"""Before a step: the rates of rules that look at the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import checks, rules
from .graphs import CapturedSteps
from .plans import PlanCache

if TYPE_CHECKING:
    from .estimators import ModelReplay


class Estimation:
    """Finds the rates of one optimizer's layers, from gradients and from the attached model.

    `layerlr.estimators` is imported with the first rule that needs it.
    """

    def __init__(self, cache: PlanCache, steps: CapturedSteps) -> None:
        self._cache, self._steps = cache, steps
        self.replay: ModelReplay | None = None

    def attach(self, model: nn.Module) -> None:
        """Remember the last batch that goes through a model."""
        from .estimators import ModelReplay

        checks.module("attach", model)
        self.detach()
        self.replay = ModelReplay(model)

    def detach(self) -> None:
        """Let go of the model."""
        if self.replay is not None:
            self.replay.close()
        self.replay = None

    def is_second_order(self) -> bool:
        """Whether the coming step's gradients must carry their graph."""
        for index, group in enumerate(self._cache.optimizer.param_groups):
            if rules.is_estimated(group["rule"]):
                self._cache.fitting(index)  # a rule that was just set counts its steps from 0
                rule = group["rule"]
                if rule.second_order and rule.due(group.get("estimated", 0)):
                    return True
        return False

    def differentiates(self) -> bool:
        """Whether a rule wants second derivatives, at some steps."""
        named = [rules.resolve(group["rule"]) for group in self._cache.optimizer.param_groups]
        return any(isinstance(rule, rules.Estimated) and rule.second_order for rule in named)

    def start(self) -> list[Tensor]:
        """The random state with which the closure is about to be evaluated."""
        from .estimators import random_state

        return random_state()

    @torch._disable_dynamo
    def estimate(self, closure: Callable[[], object] | None, start: list[Tensor]) -> None:
        """Write the rates of the coming step; the closure was evaluated from ``start``."""
        from . import estimators

        optimizer = self._cache.optimizer
        found_inf = getattr(optimizer, "found_inf", None)
        if float(found_inf or 0.0):
            return  # there will be no step
        unscaled = found_inf is not None and getattr(optimizer, "grad_scale", None) is None
        if unscaled and self.is_second_order():
            raise RuntimeError(
                "rule 'curvature' differentiates the gradients, and scaler.unscale_(optimizer) has "
                "divided their values, not their graph: leave it out, as scaler.step(optimizer) "
                "divides both, or take Curvature('fisher')"
            )
        views = []
        with torch.no_grad():
            for plans in self._steps.prepared():
                for view in plans.views:
                    view.begin(plans.group.get("estimated", 0), self._cache.config(plans))
                    views.append(view)
            again = None if closure is None else functools.partial(self._again, closure, start)
            estimators.estimate(views, self.replay, again)
            for group in optimizer.param_groups:
                estimators.release(group["params"])
        for group in optimizer.param_groups:
            if rules.is_estimated(group["rule"]):
                group["estimated"] = group.get("estimated", 0) + 1

    def _again(self, closure: Callable[[], object], start: list[Tensor]) -> None:
        """Evaluate the closure once more, as it was evaluated for this step."""
        if self.replay is None:
            raise RuntimeError("call optimizer.attach(model) before the first step's forward pass")
        with self.replay.unchanged(start), torch.enable_grad():
            closure()
