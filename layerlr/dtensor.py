"""The shard that a process holds of a `torch.distributed.tensor.DTensor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .layer_table import Span, rows


def is_sharded(x: object) -> bool:
    """Whether a tensor is a DTensor; asked without importing ``torch.distributed.tensor``."""
    return hasattr(x, "placements") and hasattr(x, "device_mesh")


def refusal(p: Any) -> str | None:
    """Why a DTensor cannot be stepped, or None."""
    if any(placement.is_partial() for placement in p.placements):
        return f"is placed {p.placements}, a sum that was not taken yet: redistribute it"
    if type(p._local_tensor) is not Tensor:
        return f"has local parts of type {type(p._local_tensor).__name__}, not plain tensors"
    return None


def groups(p: Any) -> dict[str, Any]:
    """Process groups over which the parts of a tensor are spread, by name, in mesh order."""
    if not is_sharded(p):
        return {}
    mesh = p.device_mesh
    found = {}
    for dim, placement in enumerate(p.placements):
        if not placement.is_replicate() and mesh.size(dim) > 1:
            group = mesh.get_group(dim)
            found[group.group_name] = group
    return found


def sum_over(group: Any, parts: Sequence[Tensor]) -> list[Tensor]:
    """Sums of tensors over the processes of a group, in one message."""
    # taken from where they are, or, if they are offloaded, from the group's own device
    devices: list[torch.device] = group._device_types
    device = parts[0].device
    if device.type not in {d.type for d in devices}:
        device = devices[0]
    buffer = torch.cat([part.flatten().to(device) for part in parts])
    dist.all_reduce(buffer, group=group)
    totals = buffer.split([part.numel() for part in parts])
    return [
        total.view(part.shape).to(part.device) for total, part in zip(totals, parts, strict=True)
    ]


def index(p: Any) -> int:
    """Number of this part among those of p; copies of a part have one number."""
    number = 0
    if is_sharded(p):
        sizes, at = p.device_mesh.shape, p.device_mesh.get_coordinate()
        for size, k, placement in zip(sizes, at, p.placements, strict=True):
            if not placement.is_replicate():
                number = number * size + k
    return number


def local_part(x: Any) -> Any:
    """Shard of a DTensor that this process holds, a tensor of its own over the same memory."""
    return x._local_tensor.detach() if is_sharded(x) else x


def like(p: Any, local: Tensor, shape: Sequence[int] | None = None) -> Any:
    """A tensor placed as p is, of which this process holds ``local``.

    ``shape``: that of the whole, where it is not p's; it is contiguous then.
    """
    if not is_sharded(p):
        return local
    from torch.distributed.tensor import DTensor

    stride = p.stride()
    if shape is not None:
        stride = torch.empty(shape, device="meta").stride()
    whole = torch.Size(shape or p.shape)
    return DTensor.from_local(
        local, p.device_mesh, p.placements, run_check=False, shape=whole, stride=stride
    )


def local_gradient(p: Any) -> Tensor | None:
    """The part of ``p.grad`` that belongs to this process's shard of p.

    A gradient that is placed otherwise (not reduced yet, say) is brought into p's placement.
    """
    g = p.grad
    if g is None:
        return None
    if is_sharded(g):
        if g.placements != p.placements:
            g = g.redistribute(p.device_mesh, p.placements)
        g = g._local_tensor
    # collectives under way: of torch.distributed._functional_collectives
    return g.wait() if hasattr(g, "wait") else g  # type: ignore[no-any-return]


def local_rows(p: Any, parts: Sequence[Span]) -> list[tuple[int, int]]:
    """Rows of this process's shard that belong to each span of p; empty ranges for none."""
    if not is_sharded(p):
        return [(span.begin, span.end) for span in parts]
    if len(parts) == 1:
        return [(0, rows(p._local_tensor))]
    rows_here = _local_row_numbers(p)
    return [(int((rows_here < s.begin).sum()), int((rows_here < s.end).sum())) for s in parts]


def _local_row_numbers(p: Any) -> Tensor:
    """Numbers of the rows of dim 0 in this process's shard, ascending; nothing is sent."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = [q if getattr(q, "dim", None) == 0 else Replicate() for q in p.placements]
    device = p._local_tensor.device
    numbers = torch.arange(p.shape[0], device=device)
    spread = distribute_tensor(numbers, p.device_mesh, placements, src_data_rank=None)
    return spread._local_tensor.cpu()  # type: ignore[no-any-return]


def placed_as(p: Any, value: Any, name: str) -> Any:
    """A tensor of p's shape, placed as p is: one that every process holds whole is cut.

    Raises
    ------
    RuntimeError
        For a DTensor of another mesh, by name.
    """
    if not (is_sharded(p) or is_sharded(value)):
        return value
    if not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
    if not is_sharded(p) or value.device_mesh != p.device_mesh:
        raise RuntimeError(
            f"{name} is sharded over other processes than its parameter: load it with "
            "torch.distributed.checkpoint, which reshards"
        )
    return value.redistribute(p.device_mesh, p.placements)
