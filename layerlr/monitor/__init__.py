"""Watch layers train: how far each has turned from its start, and what the rules did to it.

`LayerRotation` looks at a model and needs no particular optimizer; `StatsLog` looks at an
optimizer of this package. Both record without a host sync, and both offer ``curves``, ``plot``,
``log`` and ``state_dict``.
"""

from .rotation import LayerRotation, RotationCurves
from .stats import StatsCurves, StatsLog

__all__ = ["LayerRotation", "RotationCurves", "StatsCurves", "StatsLog"]
