"""The table behind the monitors: one number per record, quantity and layer."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from layerlr.conditions import is_number, plain_value

# Rows waiting on the device are stacked when there are this many: a row of its own costs an
# allocation (512 bytes at least on CUDA) where its numbers need 8 bytes each.
_FOLD = 256


class Writer(Protocol):
    """What `Recorder.log` needs of a writer, as `torch.utils.tensorboard.SummaryWriter` has it."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: Any = None) -> object:
        """Write one number under a tag."""


class Recorder:
    """Named per-layer series, kept on the device until somebody reads them.

    Parameters
    ----------
    names : list of str
        The layers, in the order of the columns.
    tags : dict of str to str
        The quantities, each with its prefix for a writer: ``tags["angle"] + "/" + name``.

    Notes
    -----
    Costs 8 bytes per record, quantity and layer: on the device until they are first read,
    on the host from then on.
    """

    def __init__(self, names: list[str], tags: dict[str, str]) -> None:
        self.names = names
        self._tags = tags
        self._steps: list[float] = []
        self._blocks: list[Tensor] = []  # each [records, quantities, layers], oldest first
        self._rows: list[Tensor] = []  # each [quantities, layers], newer than every block

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._steps)

    def __repr__(self) -> str:
        """Return the class with the numbers of layers and records."""
        return f"{type(self).__name__}({len(self.names)} layers, {len(self)} records)"

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes with every record read, for pickle and deepcopy."""
        self._table()
        return self.__dict__

    def log(self, writer: Writer, step: int | None = None) -> None:
        """Write the last record: ``writer.add_scalar(f"{tag}/{name}", value, step)``.

        Parameters
        ----------
        writer : object with ``add_scalar``
            For instance a `torch.utils.tensorboard.SummaryWriter`.
        step : int, optional
            The step to write; by default the one that was recorded.

        Notes
        -----
        Waits for the device, as every reading does, and reads only the last record. Writes
        nothing before the first one.
        """
        if not self._steps:
            return
        last = self._rows[-1] if self._rows else self._blocks[-1][-1]
        step = self._steps[-1] if step is None else step  # type: ignore[assignment]
        for tag, row in zip(self._tags.values(), last.tolist(), strict=True):
            for name, value in zip(self.names, row, strict=True):
                writer.add_scalar(f"{tag}/{name}", value, step)

    def state_dict(self) -> dict[str, Any]:
        """Return the records as tensors, strings and plain numbers.

        Returns
        -------
        dict
            ``names``, ``keys``, ``steps`` and ``values`` (float64, on the host, of shape
            [records, quantities, layers]); ``torch.load(weights_only=True)`` reads it back.
        """
        return {
            "names": list(self.names),
            "keys": list(self._tags),
            "steps": list(self._steps),
            "values": self._table(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the records by saved ones.

        Parameters
        ----------
        state : dict
            What `state_dict` returned.

        Raises
        ------
        ValueError
            If it holds other quantities than this monitor records, or a table of another
            shape than its names say; nothing is changed then.
        """
        if state["keys"] != list(self._tags):
            raise ValueError(f"saved with {state['keys']}, this one records {list(self._tags)}")
        shape = (len(state["steps"]), len(state["keys"]), len(state["names"]))
        if state["values"].shape != shape:
            raise ValueError(f"values have shape {tuple(state['values'].shape)}, not {shape}")
        self.names = list(state["names"])
        self._steps = list(state["steps"])
        values = state["values"].to("cpu", torch.float64, copy=True)
        self._blocks = [values] if self._steps else []  # an empty table has no columns yet
        self._rows = []

    def _number(self, step: float | None) -> float:
        """The number of a record: a plain one, as weights_only loading takes no other."""
        if step is None:
            return self._steps[-1] + 1 if self._steps else 1
        if not is_number(step):
            raise ValueError(f"Invalid step: {step!r}, wanted None or a number")
        number: float = plain_value(step)
        return number

    def _append(self, step: float, row: Tensor) -> None:
        """Add a float64 row [quantities, layers] that nobody else writes to."""
        self._steps.append(step)
        self._rows.append(row)
        if len(self._rows) == _FOLD:
            self._fold()

    def _fold(self) -> None:
        if self._rows:
            self._blocks.append(torch.stack(self._rows))
            self._rows = []

    def _table(self) -> Tensor:
        """Return everything as one host tensor [records, quantities, layers]."""
        self._fold()
        if not self._blocks:  # nor are any kept: an empty table has no columns yet
            return torch.empty(0, len(self._tags), len(self.names), dtype=torch.float64)
        if len(self._blocks) > 1 or self._blocks[0].device.type != "cpu":
            self._blocks = [torch.cat([block.cpu() for block in self._blocks])]
        return self._blocks[0]

    def _series(self, key: str) -> Tensor:
        """Return one quantity as a host tensor [records, layers]."""
        if key not in self._tags:
            raise ValueError(f"{key!r} is not recorded; {', '.join(self._tags)} are")
        return self._table()[:, list(self._tags).index(key)].clone()
