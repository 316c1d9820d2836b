"""What a contender needs of a GPU's memory, and what a step takes of it for a while.

On a host the answers are None: its memory is the user's to judge.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.peers import STATES, Contender

# A step that goes over all tensors at once may hold this many copies of the parameters.
COPIES = 4


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Within it, collections pass over what was there before: modules by the hundred thousand."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def weights_bytes(parameters: int, dtype: torch.dtype) -> int:
    """Weights and gradients, which all contenders share."""
    return 2 * parameters * dtype.itemsize


def own_bytes(contender: Contender, family: str, parameters: int, dtype: torch.dtype) -> int:
    """State, and the gradients once more where they have to be restored."""
    if contender.package == "memory":
        return 2 << 30
    state = STATES[family] * contender.state_dtype(dtype).itemsize
    return parameters * (state + (dtype.itemsize if contender.writes_grad else 0))


def fit_together(
    chosen: Sequence[Contender],
    family: str,
    parameters: int,
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Whether all contenders fit side by side."""
    free = free_bytes(device)
    need = weights_bytes(parameters, dtype) + COPIES * parameters * dtype.itemsize
    need += sum(own_bytes(contender, family, parameters, dtype) for contender in chosen)
    return free is None or need <= free


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def shortage(need: int, device: torch.device) -> str | None:
    """Why ``need`` bytes are too many, or None."""
    free = free_bytes(device)
    if free is None or need <= free:
        return None
    return f"needs {need / 1e9:.1f} GB at least, {free / 1e9:.1f} GB are free"


def extra_bytes(step: Callable[[], Any], device: torch.device) -> int | None:
    """The most that a step holds on top of what is there before it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
