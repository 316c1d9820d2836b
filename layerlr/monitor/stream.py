"""Records on their way from a step to files, TensorBoard or callbacks, without a wait."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from layerlr import devices

from . import sinks
from .copies import Copy, Snapshot

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing in Python 3.11

# A copy takes microseconds, and the device runs a step or two behind the host: a second copy is
# under way only where a step is recorded while the one before still waits in the stream.
_IN_FLIGHT = 2


class Stream:
    """Send tables of some steps of an optimizer to sinks; see `Telemetry`."""

    def __init__(self, to: Sequence[sinks.Sink], every: int) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"Invalid every: {every!r}, wanted an int of 1 or more")
        self.every = every
        self.step = 0
        self.skipped = 0
        self._copies: deque[Copy] = deque()
        for sink in to:
            sinks.check(sink)
        self._sinks = [sinks.resolve(sink) for sink in to]
        self._hooks: list[Any] = []

    def __repr__(self) -> str:
        """Return the class with its sinks."""
        return f"{type(self).__name__}({self._sinks}, every={self.every}, step={self.step})"

    @torch._disable_dynamo
    def after_step(self) -> None:
        """Count a step, record it if it is due, hand on what has arrived; the hook calls this.

        Raises
        ------
        RuntimeError
            From a sink that raised.
        """
        if devices.capturing_now():
            return
        self.step += 1
        if self.step % self.every == 0:
            self._record()
        if self._copies:
            _raise(self._deliver(wait=False))

    def flush(self) -> None:
        """Wait for the copies that are under way, and hand them on.

        Raises
        ------
        RuntimeError
            From a sink that raised; the other sinks have had every record.
        """
        _raise(self._deliver(wait=True))

    def close(self) -> None:
        """Stop watching, `flush`, close the files and flush the writers. May be called twice.

        Raises
        ------
        RuntimeError
            From a sink that raised, when all of that is done.
        """
        for hook in self._hooks:
            hook.remove()
        errors = self._deliver(wait=True)
        for sink in self._sinks:
            if isinstance(sink, (sinks.JsonLines, sinks.Scalars)):
                try:
                    sink.close()
                except Exception as error:
                    errors.append((f"{sink!r} could not be closed", error))
        _raise(errors)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close; an exception that is under way goes on, and a sink's becomes a warning."""
        try:
            self.close()
        except RuntimeError as error:
            if kind is None:
                raise
            warnings.warn(f"{error}: {error.__cause__!r}", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps seen."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count on from a saved number of steps."""
        self.step = int(state["step"])

    def _record(self) -> None:
        """Look at the step that was taken; `_send` it."""
        raise NotImplementedError

    def _deliver(self, wait: bool) -> list[tuple[str, Exception]]:
        """Give the sinks what has arrived, oldest first; return what went wrong."""
        errors: list[tuple[str, Exception]] = []
        while self._copies and (wait or self._copies[0].ready()):
            copy = self._copies.popleft()
            if wait:
                copy.wait()
            table = copy.table()
            self._look(copy.step, table)
            for sink in self._sinks:
                try:
                    sink(copy.step, table)
                except Exception as error:
                    errors.append((f"{sink!r} failed at step {copy.step}", error))
        return errors

    def _send(self, take: Callable[[], Snapshot]) -> None:
        """Begin to copy the table of this step, unless too many are under way."""
        if len(self._copies) < _IN_FLIGHT or self._copies[0].ready():
            self._copies.append(Copy(self.step, take()))
        else:
            self.skipped += 1

    def _look(self, step: int, table: dict[str, Any]) -> None:
        """See a table, and perhaps change it, before the sinks do."""


def _raise(errors: list[tuple[str, Exception]]) -> None:
    if errors:
        message, first = errors[0]
        others = f" (the first of {len(errors)} failures)" if len(errors) > 1 else ""
        raise RuntimeError(f"telemetry sink {message}{others}") from first
