"""Where telemetry goes: a callback, a file of JSON lines, a TensorBoard writer."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .recorder import Writer

#: what is called with the step and the table, ``layer_stats()`` on the host
Callback = Callable[[int, dict[str, Any]], object]
Sink = Callback | Writer | str | os.PathLike[str]


class JsonLines:
    """A file with one JSON object per layer and record: step, layer, then its quantities.

    Numbers that JSON has no word for (NaN, infinities) are null. Records are appended to what the
    file holds, each at once and flushed, so that a run that dies leaves whole ones. Missing
    folders are made.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def __repr__(self) -> str:
        """Return the path."""
        return str(self.path)

    def __call__(self, step: int, table: dict[str, Any]) -> None:
        """Append a record."""
        columns = {key: column.tolist() for key, column in table.items() if key != "names"}
        lines = []
        for name, *values in zip(table["names"], *columns.values(), strict=True):
            finite = [value if math.isfinite(value) else None for value in values]
            row = {"step": step, "layer": name, **dict(zip(columns, finite, strict=True))}
            lines.append(json.dumps(row, allow_nan=False) + "\n")
        self._file.write("".join(lines))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Scalars:
    """A writer's scalars, under the tags of `StatsLog`: ``layer_angle/<name>`` and so on.

    The writer stays its owner's: `close` flushes it if it can be flushed.
    """

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def __repr__(self) -> str:
        """Return the writer."""
        return repr(self.writer)

    def __call__(self, step: int, table: dict[str, Any]) -> None:
        """Write a record, one scalar per layer and quantity."""
        for key, column in table.items():
            if key != "names":
                for name, value in zip(table["names"], column.tolist(), strict=True):
                    self.writer.add_scalar(f"layer_{key}/{name}", value, step)

    def close(self) -> None:
        """Flush the writer."""
        flush = getattr(self.writer, "flush", None)
        if flush is not None:
            flush()


def check(sink: Sink) -> None:
    """Refuse what nothing can be sent to, before a file is made.

    Raises
    ------
    ValueError
        For a path that does not end in ``.jsonl``.
    TypeError
        For anything that is neither a path, nor a writer, nor callable.
    """
    if isinstance(sink, (str, os.PathLike)):
        if Path(sink).suffix != ".jsonl":
            raise ValueError(f"do not know how to write {str(sink)!r}: wanted a path like x.jsonl")
    elif not (hasattr(sink, "add_scalar") or callable(sink)):
        raise TypeError(
            "a sink is a callable (step, table), a path ending in .jsonl or a writer with "
            f"add_scalar, not a {type(sink).__name__}"
        )


def resolve(sink: Sink) -> Callback:
    """Return what to call for a sink."""
    if isinstance(sink, (str, os.PathLike)):
        return JsonLines(Path(sink))
    return Scalars(sink) if hasattr(sink, "add_scalar") else sink
