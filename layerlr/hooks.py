"""What torch does around a step, where there is somebody to see it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer

from . import _C

_GLOBAL = (
    torch_optimizer._global_optimizer_pre_hooks,
    torch_optimizer._global_optimizer_post_hooks,
)


def around(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step with torch's hooks, and its record for profilers.

    torch opens a record at each step, whether somebody profiles or not: 11 us of some 25 that a
    step costs whatever the number of its parameters (`bench.host_cost`).
    """
    seen = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if (
            torch.compiler.is_compiling()  # which leaves records out itself
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or any(_GLOBAL)
            or _C.is_recorded()
        ):
            return seen(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    return wrapper
