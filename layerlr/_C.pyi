from collections.abc import Sequence
from typing import Any

from torch import Tensor

def directions() -> list[str]: ...
def rules() -> list[str]: ...
def columns() -> int: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def same_objects(x: list[Any], y: list[Any]) -> bool: ...
def is_dense(t: Tensor, split: bool) -> bool: ...

class Snapshot:
    def __init__(self, dict: dict[Any, Any]) -> None: ...
    def matches(self, dict: dict[Any, Any]) -> bool: ...

class LivePlan:
    READY: int
    STALE: int
    def __init__(
        self,
        params: list[Tensor],
        states: Sequence[dict[str, Any] | None],
        keys: list[str],
        spans: Sequence[tuple[int, int, int, int]],
        ruled: list[bool],
        lr_scale: list[float],
        direction: str,
        rule: str | None,
        rule_hyper: Sequence[float],
        keeps: str | None,
        stats: Tensor,
        precision: str,
        extra_key: str,
    ) -> None: ...
    def prepare(self) -> int: ...
    def finish(self) -> None: ...
    def rows(self) -> Tensor: ...
    def kept(self) -> Tensor: ...

class CpuPlan(LivePlan):
    def __init__(self, live: LivePlan) -> None: ...
    def step(
        self,
        lr: float,
        weight_decay: float,
        decoupled: bool,
        sign: float,
        skip: bool,
        direction_hyper: Sequence[float],
    ) -> None: ...
    def measure(
        self,
        lr: float,
        weight_decay: float,
        decoupled: bool,
        sign: float,
        skip: bool,
        direction_hyper: Sequence[float],
    ) -> Tensor: ...
    def apply(
        self,
        lr: float,
        weight_decay: float,
        decoupled: bool,
        sign: float,
        skip: bool,
        direction_hyper: Sequence[float],
        sums: Tensor,
    ) -> None: ...
    def norms(
        self,
        lr: float,
        weight_decay: float,
        decoupled: bool,
        sign: float,
        skip: bool,
        direction_hyper: Sequence[float],
    ) -> Tensor: ...

class DevicePlan(LivePlan):
    def __init__(
        self, live: LivePlan, engine: Any, blocks: int, hold: int, plain: bool
    ) -> None: ...
    def step(
        self,
        lr: float,
        weight_decay: float,
        decoupled: bool,
        sign: float,
        skip: bool,
        direction_hyper: Sequence[float],
        there: Sequence[Tensor | None],
    ) -> None: ...
    def measure(
        self,
        lr: float,
        weight_decay: float,
        decoupled: bool,
        sign: float,
        skip: bool,
        direction_hyper: Sequence[float],
        there: Sequence[Tensor | None],
    ) -> Tensor: ...
    def apply(
        self,
        lr: float,
        weight_decay: float,
        decoupled: bool,
        sign: float,
        skip: bool,
        direction_hyper: Sequence[float],
        there: Sequence[Tensor | None],
        sums: Tensor,
    ) -> None: ...
    def norms(
        self,
        lr: float,
        weight_decay: float,
        decoupled: bool,
        sign: float,
        skip: bool,
        direction_hyper: Sequence[float],
        there: Sequence[Tensor | None],
    ) -> Tensor: ...
    def refresh(
        self,
        lr: float,
        weight_decay: float,
        decoupled: bool,
        sign: float,
        skip: bool,
        direction_hyper: Sequence[float],
        there: Sequence[Tensor | None],
    ) -> None: ...
    def memory(self) -> int: ...
