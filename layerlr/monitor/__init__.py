"""Watch layers train: how far each has turned from its start, and what the rules did to it.

`LayerRotation` looks at a model and needs no particular optimizer; `AngularRates` looks at any
optimizer's steps, `StatsLog` and `Telemetry` at one of this package. `LayerRotation` and `StatsLog`
keep their records, on the device until somebody asks for ``curves``, ``plot``, ``log`` or
``state_dict``; the other two stream every K-th step out of a long run and keep the last, or
nothing. None of them makes a step wait for the device. `replay` has a run turn as another did.
"""

from .angular import AngularRates
from .replay import Replay, Trace, replay
from .rotation import LayerRotation, RotationCurves
from .stats import StatsCurves, StatsLog
from .telemetry import Telemetry

__all__ = [
    "AngularRates",
    "LayerRotation",
    "Replay",
    "RotationCurves",
    "StatsCurves",
    "StatsLog",
    "Telemetry",
    "Trace",
    "replay",
]
