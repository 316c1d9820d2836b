"""What torch does around a step, where there is somebody to see it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import (
    Optimizer,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from . import _C


def around(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step with torch's hooks, and its record for profilers where there is one.

    torch opens a record at each step, whether somebody profiles or not, which takes about half of
    what a step costs whatever the number of its parameters (bench/README.md).
    """
    seen = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        self: Optimizer = args[0]
        if (
            torch.compiler.is_compiling()  # which leaves records out itself
            or self._optimizer_step_pre_hooks
            or _global_optimizer_pre_hooks
            or _C.is_recorded()
        ):
            return seen(*args, **kwargs)
        out = step(*args, **kwargs)
        for hooks in (self._optimizer_step_post_hooks, _global_optimizer_post_hooks):
            for hook in hooks.values():  # those that the closure has registered, too
                hook(self, args, kwargs)
        return out

    return wrapper
