"""What a user gives: conditions on it, and plain numbers for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def holds(condition: Callable[[Any], Any], value: Any) -> bool:
    """Whether a condition holds; of a value that it cannot be asked of it does not.

    So a string is no number of at least 0: YAML reads ``1e-3`` as one.
    """
    try:
        return bool(condition(value))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False


def is_number(value: Any) -> bool:
    """Whether a value is one number, NaN included; a tensor of one element is."""
    value = value.detach() if isinstance(value, Tensor) else value
    return holds(lambda x: isinstance(float(x + 0.0), float), value)


def plain_value(x: Any) -> Any:
    """Python's own numbers, or lists of them, for those of tensors, arrays and NumPy."""
    return x.tolist() if hasattr(x, "tolist") else x
