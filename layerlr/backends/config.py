"""The numbers of one step."""

from __future__ import annotations

from array import array

from torch import Tensor

from layerlr import _C

LR = _C.CONFIG["lr"]
L2 = _C.CONFIG["l2"]
DECOUPLED_DECAY = _C.CONFIG["decoupled_decay"]
GRAD_FACTOR = _C.CONFIG["grad_factor"]
SKIP = _C.CONFIG["skip"]
FOUND_INF = _C.CONFIG["found_inf"]
PLAIN = _C.CONFIG["plain"]
TAKEN = _C.CONFIG["taken"]
DIRECTION = _C.CONFIG["direction"]
RULE = _C.CONFIG["rule"]

#: stands in the array for a number that the host has not read
UNREAD = -float("inf")

_DEFAULTS = array("d", [0.0] * _C.CONFIG["size"])
_DEFAULTS[GRAD_FACTOR] = _DEFAULTS[PLAIN] = 1.0


class StepConfig:
    """What a step reads afresh from its param group: a float64 array that every engine reads.

    Attributes
    ----------
    values
        The numbers in the order of ``csrc/step_config.h``, which has their meanings.
    tensors
        By place, the numbers that are tensors on a device, which nobody waits for, or that autograd
        follows; `UNREAD` stands for them in ``values``.
    """

    __slots__ = ("tensors", "values")

    def __init__(self) -> None:
        self.values = _DEFAULTS[:]
        self.tensors: dict[int, Tensor] = {}

    def put(self, place: int, value: float | Tensor) -> None:
        """Set a number; one that the host can read at once is read."""
        self.tensors.pop(place, None)
        if isinstance(value, Tensor) and (value.device.type != "cpu" or value.requires_grad):
            self.tensors[place] = value
            value = UNREAD
        self.values[place] = float(value)

    def get(self, place: int) -> float | Tensor:
        """A number, wherever it is."""
        return self.tensors.get(place, self.values[place])

    def replaced(self, place: int, value: float | Tensor) -> StepConfig:
        """The same config with another number."""
        other = StepConfig()
        other.values, other.tensors = self.values[:], dict(self.tensors)
        other.put(place, value)
        return other

    def on_host(self) -> array[float]:
        """All numbers; those that are on a device are waited for."""
        if not self.tensors:
            return self.values
        values = self.values[:]
        for place, value in self.tensors.items():
            values[place] = float(value)
        return values

    @property
    def skips(self) -> bool:
        """Whether layers with a sum that is not finite are left alone."""
        return self.values[SKIP] != 0.0

    @property
    def changes_nothing(self) -> bool:
        """Whether the host knows that the step is to change nothing at all."""
        return FOUND_INF not in self.tensors and self.values[FOUND_INF] != 0.0
