"""Cosine distances between stored and present weights, in float64, of whole layers."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from layerlr import devices, dtensor

# Elements converted to float64 at a time. On the host a piece stays in cache (one thread: 4 ns per
# element at 2^17, 21 ns at 2^22); elsewhere launches of 2^22 cost less than their work, and each
# temporary is 32 MB.
_PIECE = 1 << 17
_PIECE_LAUNCHED = 1 << 22


def local(weight: Tensor) -> Tensor:
    """Return what this rank holds of a parameter, complex numbers as pairs of real ones."""
    weight = dtensor.local_part(weight.detach())
    return torch.view_as_real(weight) if weight.is_complex() else weight


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without waiting unless that is the host, which would race."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def norms(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Return ``|t| = sqrt(sum t^2)`` of each layer, a float64 scalar on its weight's device.

    Parameters
    ----------
    tensors : sequence of Tensor
        What this rank holds of each layer, on any device.
    weights : sequence of Tensor
        The parameters, which say where to compute and which ranks hold the rest.
    """
    sums = [_squares(_pieces(t, w.device), w) for t, w in zip(tensors, weights, strict=True)]
    return [total.sqrt() for total in _across_ranks(sums, weights)]


def distances(
    tensors: Sequence[Tensor],
    tensor_norms: Sequence[Tensor],
    weights: Sequence[Tensor],
    weight_norms: Sequence[Tensor],
) -> Tensor:
    """Return ``1 - <t, w> / (|t| |w|)`` of each layer, computed as ``|t/|t| - w/|w||^2 / 2``.

    The difference keeps its relative accuracy however small it is (1 - cos has an absolute error
    of about 1e-16 instead) and is never negative. 0 where a norm is zero.

    Parameters
    ----------
    tensors, weights : sequence of Tensor
        As in `norms`; the weights are whole parameters.
    tensor_norms, weight_norms : sequence of Tensor
        Their norms.

    Returns
    -------
    Tensor [layers]
        float64, on the device that `collect` chooses.
    """
    sums = []
    for t, t_norm, w, w_norm in zip(tensors, tensor_norms, weights, weight_norms, strict=True):
        pairs = zip(_pieces(t, w.device), _pieces(local(w), w.device), strict=True)
        sums.append(_squares((a.div_(t_norm).sub_(b.div_(w_norm)) for a, b in pairs), w))
    squares = collect(_across_ranks(sums, weights))
    t_norm, w_norm = collect(tensor_norms), collect(weight_norms)
    undefined = (t_norm == 0) | (w_norm == 0)
    return torch.where(undefined, 0 * (t_norm + w_norm), squares / 2)  # 0, or NaN beside inf or NaN


def collect(scalars: Sequence[Tensor]) -> Tensor:
    """Return scalars as one vector, on the first accelerator among their devices if any."""
    home = devices.home([scalar.device for scalar in scalars])
    return torch.stack([moved(scalar, home) for scalar in scalars])


def angles(distance: Tensor) -> Tensor:
    """Return ``arccos(1 - d) = 2 arcsin(sqrt(d/2))`` in radians, accurate for small d."""
    return (distance / 2).clamp(max=1).sqrt().asin() * 2


def _pieces(tensor: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Yield fresh float64 pieces of a tensor on a device, in logical order."""
    size = _PIECE if device.type == "cpu" else _PIECE_LAUNCHED
    for piece in tensor.reshape(-1).split(size):
        # Two steps: one call would convert on the host, into memory that is not pinned.
        yield moved(piece, device).to(torch.float64, copy=True)


def _squares(pieces: Iterable[Tensor], weight: Tensor) -> Tensor:
    """Return the sum of the squares of all pieces."""
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for piece in pieces:
        total += piece.square_().sum()
    return total


def _across_ranks(sums: list[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Complete the sums of sharded layers: one all-reduce for each process group."""
    of_weights = [dtensor.groups(w) for w in weights]
    groups: dict[str, Any] = functools.reduce(dict.__or__, of_weights, {})
    for name, group in groups.items():
        members = [i for i, of in enumerate(of_weights) if name in of]
        totals = dtensor.sum_over(group, [sums[i] for i in members])
        for i, total in zip(members, totals, strict=True):
            sums[i] = total
    return sums
