"""Per-layer statistics as one table, and its way to the host without waiting for the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from layerlr import advice
from layerlr.wrapped_checks import innermost


class HasLayerStats(Protocol):
    """An optimizer that tells what its layer rules did."""

    def layer_stats(self) -> dict[str, Any]:
        """Return ``names`` and one tensor per quantity, of one number per layer."""


def with_layer_stats(optimizer: Any) -> Any:
    """The optimizer that tells; Accelerate's and Lightning's have it as their ``optimizer``.

    Raises
    ------
    TypeError
        For others.
    """
    optimizer = innermost(optimizer)
    if not hasattr(optimizer, "layer_stats"):
        kind = type(optimizer).__name__
        raise TypeError(f"wanted an optimizer of layerlr, with layer_stats, not {kind}")
    return optimizer


class Snapshot(NamedTuple):
    """``layer_stats()`` at one moment: nothing that the optimizer does later changes it.

    Attributes
    ----------
    names : list of str
        The layers, each name once.
    dtypes : dict of str to dtype
        The quantities in order, and what they were before they were stacked.
    values : Tensor [quantities, layers]
        float64, on the device of the statistics.
    """

    names: list[str]
    dtypes: dict[str, torch.dtype]
    values: Tensor


@torch.no_grad()
def snapshot(stats: dict[str, Any], keys: Iterable[str] | None = None) -> Snapshot:
    """Copy a table of statistics: 8 bytes per quantity and layer, no sync.

    Parameters
    ----------
    stats : dict
        What ``layer_stats()`` returned, perhaps with more columns.
    keys : iterable of str, optional
        The quantities; by default all of the table.
    """
    if not stats["names"]:
        warnings.warn(
            "no layer is measured: give a rule, on_nonfinite='skip' to a group without one, or use "
            "layerlr.monitor.AngularRates, which watches any optimizer",
            stacklevel=advice.level_of_the_caller(),
        )
    columns = {key: stats[key] for key in keys or stats if key != "names"}
    # Stacking copies: the optimizer may write its next step into the same tensors.
    values = torch.stack([column.detach().to(torch.float64) for column in columns.values()])
    dtypes = {key: column.dtype for key, column in columns.items()}
    return Snapshot(distinct(stats["names"]), dtypes, values)


def distinct(names: Iterable[str]) -> list[str]:
    """Tell layers of the same name apart by their place: ``name``, ``name#2``."""
    count: dict[str, int] = {}
    found = []
    for name in names:
        count[name] = count.get(name, 0) + 1
        found.append(name if count[name] == 1 else f"{name}#{count[name]}")
    return found


def to_host(values: Tensor) -> tuple[Tensor, torch.Event | None]:
    """Begin to copy a tensor that nobody else writes to, behind the work of its current stream.

    Returns
    -------
    Tensor
        On the host, not to be read before the event; the tensor itself if it is there already.
    Event or None
        Done when the copy is; None where there is nothing to wait for.

    Notes
    -----
    The pinned memory comes from torch's cache, which has some of that size from the second copy
    on; allocating it anew may wait for the device, once.
    """
    if values.device.type == "cpu":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    return host, torch.accelerator.current_stream(values.device).record_event()


class Copy:
    """A snapshot on its way to the host.

    Parameters
    ----------
    step : int
        The step that it tells of.
    taken : Snapshot
        Its table.
    """

    def __init__(self, step: int, taken: Snapshot) -> None:
        self.step = step
        self._names, self._dtypes = taken.names, taken.dtypes
        self._host, self._event = to_host(taken.values)

    def ready(self) -> bool:
        """Whether it has arrived; asks without waiting."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Return when it has arrived."""
        if self._event is not None:
            self._event.synchronize()

    def table(self) -> dict[str, Any]:
        """Return what has arrived, as ``layer_stats()`` has it, in memory that is not pinned."""
        rows = self._host.clone()
        columns = {
            key: row.to(dtype)
            for (key, dtype), row in zip(self._dtypes.items(), rows.unbind(), strict=True)
        }
        return {"names": self._names, **columns}
