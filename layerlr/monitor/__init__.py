"""Watch layers train: how far each has turned from its start, and what the rules did to it.

`LayerRotation` looks at a model and needs no particular optimizer; `StatsLog` and `Telemetry` look
at an optimizer of this package. The first two keep their records, on the device until somebody asks
for ``curves``, ``plot``, ``log`` or ``state_dict``; `Telemetry` streams every K-th step out of a
long run and keeps nothing. None of them makes a step wait for the device.
"""

from .rotation import LayerRotation, RotationCurves
from .stats import StatsCurves, StatsLog
from .telemetry import Telemetry

__all__ = ["LayerRotation", "RotationCurves", "StatsCurves", "StatsLog", "Telemetry"]
