"""How far each layer turns in a step, and how long the step is, under any optimizer."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from layerlr import backends, checks, devices, dtensor, options, rules, statistics
from layerlr.layers import Adapt, LayerKey
from layerlr.optimizer import LayerwiseOptimizer
from layerlr.step_in_backward import steps_in_backward
from layerlr.wrapped_checks import innermost
from layerlr.wrapping import Wrapped

from .copies import Snapshot, distinct
from .measured import MeasuredSteps
from .sinks import Sink
from .stream import Stream

_QUANTITIES = ("angle", "relative")


class AngularRates(Stream):
    """Tell each layer's angle per step and relative step, for any torch optimizer.

    ::

        angle = arccos(w(t-1).w(t) / (|w(t-1)| |w(t)|))
        relative = |w(t) - w(t-1)| / |w(t-1)|

    The angle, in radians, is what others call angular update size, rotation per step or, for
    layers whose norm does not matter, effective learning rate; the relative step is also known as
    update-to-weight ratio and relative update.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Any. A wrapper that has it as its ``optimizer`` (Accelerate's, Lightning's) will do.
    *to : callable, path or writer
        Where the tables go, if anywhere; as `Telemetry` takes them. A path ending in ``.jsonl``
        makes a trace, and so does a `Trace`, that `replay` plays back.
    every : int
        K. The steps K, 2K, ... are measured.
    adapt : {"kernels", "all"} or callable (name, parameter) -> bool
        Which parameters are watched; of ``"kernels"`` two dimensions are larger than 1.
    layers : {"tensor", "module"} or callable (name, parameter) -> key
        Which of them form a layer.
    model : torch.nn.Module, optional
        Whose parameters' names to use where the optimizer has none; see `attach`.
    backend : str
        The engine that measures.

    Attributes
    ----------
    step : int
        Steps seen; `state_dict` carries it over to the next run.
    skipped : int
        Tables that no sink had because two copies were on their way; `rates` has them.

    Raises
    ------
    TypeError
        For what is no optimizer, and a `model` that is none.
    ValueError
        For `every` below 1, a sink, a backend, `adapt` or `layers` of an unknown kind, and layers
        by module where parameters have no names.

    Notes
    -----
    An optimizer of this package knows its angles: where every group has a rule, they are read
    after the step, for 24 bytes a layer; `adapt`, `layers` and `backend` are without effect then,
    since its layers are watched as it has them (what ``layer_stats`` names), and in 16-bit weights
    they are those of the step before it was rounded. Layers that it left out (no gradient, a
    non-finite one, an overflow) are at 0. Where a rule scales gradients, shards and
    wrappers do not know the step in time, and are measured like the optimizers of others.

    Those are measured by hooks before and after ``step()``. Cost of a measured step: one copy of
    the watched weights, in memory while the step lasts, and one reading of both: 16 bytes a
    float32 weight. No weight, gradient or state is changed. Under sharding one packed message a
    process group, so every rank must construct it. The steps in between cost nothing.

    Nothing waits for the device: not the step, not `rates`, not the sinks. A layer of norm zero has
    angle and relative step 0. A step inside a captured CUDA graph, or one that
    `layerlr.step_in_backward` takes while the gradients come, is not seen.

    Examples
    --------
    >>> rates = AngularRates(torch.optim.AdamW(model.named_parameters()), "angles.jsonl", every=10)
    >>> train(model)
    >>> rates.rates()["angle"]

    References
    ----------
    Kosson et al., Rotational equilibrium (arXiv:2305.17212), has the angular update size;
    Layca (arXiv:1806.01603) sets the angle to atan(lr).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *to: Sink,
        every: int = 1,
        adapt: str | Adapt = "kernels",
        layers: Literal["tensor", "module"] | LayerKey = "tensor",
        model: nn.Module | None = None,
        backend: str = "auto",
    ) -> None:
        watched = innermost(optimizer)
        if not isinstance(watched, Optimizer):
            raise TypeError(f"wanted a torch.optim.Optimizer, got {type(watched).__name__}")
        backends.validate(backend)
        for index, group in enumerate(watched.param_groups):
            like = {"adapt": adapt, "layers": layers, "param_names": group.get("param_names")}
            if isinstance(model, nn.Module):
                like["param_names"] = []  # the model's
            for option in (options.OPTIONS["adapt"], options.OPTIONS["layers"]):
                if option.check is not None:
                    option.check(like, index)
        if model is not None:
            checks.module("AngularRates", model)
        super().__init__(to, every)
        self.optimizer = watched
        self._options = (adapt, layers, backend)
        self._rates: dict[str, Any] | None = None
        self._measured_at = 0
        self._before: Tensor | None = None
        self.attach(model)
        self._hooks = [
            watched.register_step_pre_hook(lambda *_: self.before_step()),
            watched.register_step_post_hook(lambda *_: self.after_step()),
        ]

    def attach(self, model: nn.Module | None) -> None:
        """Name the layers after a model's parameters, where the optimizer has no names of its own.

        The optimizer is left as it is; one of this package has an ``attach`` that names them there.
        """
        if model is not None:
            checks.module("attach", model)
        adapt, layers, backend = self._options
        self._steps = MeasuredSteps(self.optimizer, adapt, layers, backend, model)

    @torch._disable_dynamo
    def before_step(self) -> None:
        """Copy what the coming step changes, if it is due; the hook calls this."""
        if (self.step + 1) % self.every or devices.capturing_now():
            return
        if self._told():
            if not steps_in_backward(self.optimizer):  # they have stepped already
                self._before = statistics.progress(cast(LayerwiseOptimizer, self.optimizer).plans)
        else:
            self._steps.begin()

    def _record(self) -> None:
        found = self._steps.end()
        if self._told():
            plans = cast(LayerwiseOptimizer, self.optimizer).plans
            found = statistics.rates(plans, self._before)
        self._before = None
        if found is not None:
            self._rates, self._measured_at = found, self.step
            if self._sinks:
                self._send(self._snapshot)

    def rates(self) -> dict[str, Any]:
        """Return what was measured last, without waiting for the device.

        Returns
        -------
        dict
            ``names`` (list), ``angle`` and ``relative`` (float64 tensors, one number a layer, on
            the device) and ``step``, the number of the step; empty and 0 before the first.
        """
        empty = torch.zeros(0, dtype=torch.float64)
        found = self._rates or {"names": [], "angle": empty, "relative": empty}
        return {**found, "step": self._measured_at}

    def _snapshot(self) -> Snapshot:
        found = self.rates()
        values = torch.stack([found[key] for key in _QUANTITIES])
        return Snapshot(distinct(found["names"]), dict.fromkeys(_QUANTITIES, values.dtype), values)

    def _told(self) -> bool:
        """Whether the optimizer knows the angles of its last step."""
        return isinstance(self.optimizer, LayerwiseOptimizer) and all(
            _knows_its_step(self.optimizer, group) for group in self.optimizer.param_groups
        )


def _knows_its_step(optimizer: LayerwiseOptimizer, group: dict[str, Any]) -> bool:
    rule = rules.resolve(group["rule"])
    if rule is None or rule.order == "update":
        return rule is not None
    params: list[Tensor] = group["params"]
    return not isinstance(optimizer, Wrapped) and not any(map(dtensor.is_sharded, params))
