"""Ways to lay a tensor out in memory; each returns a copy of the same values."""

from __future__ import annotations

import torch


def strided(t):
    """Every second element of every dimension of something larger."""
    room = torch.full([2 * n for n in t.shape], 7.0, dtype=t.dtype, device=t.device)
    view = room[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


def transposed(t):
    """The last dimension outermost."""
    return t.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)


def channels_last(t):
    return t.clone(memory_format=torch.channels_last)


def shifted(t, by=3):
    """Begun some elements into its memory."""
    room = torch.empty(t.numel() + by, dtype=t.dtype, device=t.device)
    return room[by:].view(t.shape).copy_(t)


def columns(t):
    """Some columns of a wider matrix."""
    room = torch.full((*t.shape[:-1], t.shape[-1] + 5), 7.0, dtype=t.dtype, device=t.device)
    return room[..., 2 : 2 + t.shape[-1]].copy_(t)


def plain(t):
    return t.clone()
