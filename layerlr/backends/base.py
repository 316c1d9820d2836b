"""What a backend is, and the values that cross its border."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from layerlr import memory
from layerlr.directions import Direction
from layerlr.layer_table import LayerTable
from layerlr.precision import Precision
from layerlr.rules import LayerRule

from .config import StepConfig

#: columns of a plan's ``stats`` tensor, float64 [layers, columns]
COLUMNS = ("ww", "gg", "uu", "wu", "scale", "lr", "a", "b", "skipped")


class PlanSpec(NamedTuple):
    """What a plan is built from; rebuilt when any of it changes."""

    table: LayerTable
    direction: Direction
    rule: LayerRule | None
    states: list[dict[str, Any] | None]  # optimizer.state of each parameter, the live dicts
    stats: Tensor
    differentiable: bool
    precision: Precision  # of the parameters of 16 bits


class Plan(Protocol):
    """The cached multi-tensor table of one group on one device."""

    spec: PlanSpec

    def prepare(self) -> bool:
        """Read the gradients and check them, changing nothing; False: the plan is out of date."""

    def step(self, config: StepConfig) -> None:
        """One step with the gradients that `prepare` read."""

    def norms(self, config: StepConfig) -> Tensor:
        """``sum((grad_factor*g)**2)`` of each layer, before L2 decay; float64 [layers].

        Over the tensors that have a gradient, in every layer of the table; changes nothing.
        """

    def measure(self, config: StepConfig) -> Tensor:
        """``ww gg uu wu`` of each layer; float64 [layers, 4]: the first half of a step.

        The sums are over the table's own parameters, as the first pass takes them, which advances
        the state where the rule scales updates. Only where there is something to measure.
        """

    def apply(self, config: StepConfig, sums: Tensor) -> None:
        """The second half of a step: all that follows from ``sums``, those of the whole layers.

        After `measure` with the same numbers, and with its very answer, the same bits as `step`.
        Of a rule that scales gradients, ``ww uu wu`` in the statistics are sums over the table's
        own parameters.
        """

    def forget(self) -> None:
        """Let go of what `prepare` read, where no step follows `measure`."""

    def refresh(self, config: StepConfig) -> None:
        """Bring the numbers to where captured steps read them."""


class Backend(Protocol):
    """A way to run plans."""

    name: str

    def missing(self, device: torch.device) -> str | None:
        """Why this backend runs nothing on a device, or None."""

    def unsupported(self, spec: PlanSpec) -> str | None:
        """Why this backend cannot run the case, or None if it can."""

    def plan(self, spec: PlanSpec) -> Plan:
        """Plan for a supported case."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Dtype of arithmetic and state: float64 for double parameters, else float32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def state_dtype(p: Tensor) -> torch.dtype:
    """Dtype of a parameter's per-element state."""
    if p.is_complex():
        return p.dtype
    return accumulator(p.dtype)


def check_tensors(name: str, p: Tensor, g: Tensor, state: Mapping[str, Any] | None) -> None:
    """Raise RuntimeError, naming the parameter, for what no backend can use of a step's tensors."""
    _check_gradient(name, p, g)
    memory.check(name, {"weights": p, "gradient": g, **(state or {})})


def _check_gradient(name: str, p: Tensor, g: Tensor) -> None:
    if g.layout != torch.strided:
        raise RuntimeError(
            f"layerlr does not support sparse gradients (parameter {name!r}): build its module "
            "with sparse=False, or give the parameter to torch.optim.SparseAdam"
        )
    if g.shape != p.shape:
        raise RuntimeError(
            f"the gradient of parameter {name!r} has shape {tuple(g.shape)}, the parameter "
            f"{tuple(p.shape)}: clear gradients after changing a parameter's data"
        )
    if g.device != p.device:
        raise RuntimeError(
            f"the gradient of parameter {name!r} is on {g.device}, the parameter on {p.device}: "
            "clear gradients after moving a parameter"
        )
    if g.is_complex() != p.is_complex():
        raise RuntimeError(
            f"the gradient of parameter {name!r} is {g.dtype}, the parameter {p.dtype}"
        )
