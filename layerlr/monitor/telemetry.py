"""Statistics of the layers, streamed out of a run while it trains."""

from __future__ import annotations

import warnings
from typing import Any

from layerlr import statistics
from layerlr.optimizer import LayerwiseOptimizer

from .copies import HasLayerStats, snapshot, with_layer_stats
from .sinks import Sink
from .stream import Stream

# A layer that was left out in so many steps on end is reported: one bad batch is not.
_SKIPPED_ON_END = 10

_GROWS_TO = "grows_to"


class Telemetry(Stream):
    """Send ``optimizer.layer_stats()`` of every K-th step to files, TensorBoard or callbacks.

    For long runs, where somebody watches or reads later; nothing is kept. `StatsLog` keeps its
    records instead, on the device until it is asked for curves and plots.

    Parameters
    ----------
    optimizer : optimizer of this package
        It is watched by a post hook on its ``step``. A wrapper that has it as its ``optimizer``
        (Accelerate's, Lightning's) will do.
    *to : callable, path or writer
        Where the tables go: a callable ``(step, table)``, whose table is ``layer_stats()`` on the
        host; a path ending in ``.jsonl``, to which one JSON object per layer is appended
        (``step``, ``layer``, ``ww`` ...; NaN and infinities are null), so that
        ``pandas.read_json(path, lines=True)`` is the table; an object with ``add_scalar``, such
        as `torch.utils.tensorboard.SummaryWriter`, under the tags ``layer_ww/<name>`` and so on.
    every : int
        K. The steps K, 2K, ... are recorded.

    Attributes
    ----------
    step : int
        Steps seen; `state_dict` carries it over to the next run.
    skipped : int
        Records left out because two copies were on their way.

    Raises
    ------
    TypeError, ValueError
        For an optimizer without ``layer_stats``, a sink of another kind, `every` below 1.

    Notes
    -----
    A recorded step queues the copy of one table (64 bytes per layer) to pinned memory, and an event
    behind it; the steps after it ask the event and hand the table on when it has come, as a rule
    at the next one. No step waits for the device: where two copies are still under way, the third
    record is left out and counted. On the CPU the table is handed on at once. On the host the
    steps in between cost about 1.5 us; a record, per layer, 0.6 us (under a rule with a radius
    three times as much), and handed on 10 us for JSON lines, 125 us for TensorBoard.

    A sink that raises does so out of ``optimizer.step()`` (whose update is complete by then) or
    out of `close`, as RuntimeError; the other sinks have had the record, and all of them are tried
    again with the next one.

    A layer that was skipped (for NaN or infinities in its gradient) in at least ten steps on end,
    from one record to another, is named in a warning, once.

    While a layer that started at zero takes plain steps under a rule with a radius (Layca,
    Hyperball), the table has one more column, ``grows_to``: the radius at which the layer comes
    under the rule; 0 for the others.

    Layers may come, go or change their names between records. Where ranks train together, build it
    on one of them. ``step`` inside a captured CUDA graph calls no hooks when replayed: call
    `after_step` after each replay.

    Examples
    --------
    >>> with Telemetry(opt, "run/layers.jsonl", SummaryWriter("run"), every=100):
    ...     train(model, opt)
    """

    def __init__(self, optimizer: HasLayerStats, *to: Sink, every: int = 100) -> None:
        self.optimizer = with_layer_stats(optimizer)
        super().__init__(to, every)
        self._taking_part: dict[str, tuple[int, int]] = {}  # step and skips when last known to
        self._reported: set[str] = set()
        self._hooks = [self.optimizer.register_step_post_hook(lambda *_: self.after_step())]

    def _record(self) -> None:
        self._send(lambda: snapshot(self._table()))

    def _table(self) -> dict[str, Any]:
        """Statistics, with the radii that layers may be growing to."""
        stats = self.optimizer.layer_stats()
        ours = isinstance(self.optimizer, LayerwiseOptimizer)
        radii = statistics.growing(self.optimizer.plans) if ours else None
        return stats if radii is None else {**stats, _GROWS_TO: radii}

    def _look(self, step: int, table: dict[str, Any]) -> None:
        """Leave out radii that no layer grows to; warn of layers left out for long."""
        if _GROWS_TO in table and not table[_GROWS_TO].any():
            del table[_GROWS_TO]
        if "skipped" not in table:
            return
        stuck = []
        for name, skipped in zip(table["names"], table["skipped"].tolist(), strict=True):
            since, before = self._taking_part.get(name, (step, skipped))
            if skipped - before < step - since or skipped == before:
                self._taking_part[name] = step, skipped
            elif step - since >= _SKIPPED_ON_END and name not in self._reported:
                stuck.append(name)
        if stuck:
            self._reported.update(stuck)
            warnings.warn(
                f"layers {', '.join(stuck)} were skipped in each of the last {_SKIPPED_ON_END} "
                f"steps or more (at step {step}): their gradients hold NaN or infinities",
                stacklevel=2,
            )
