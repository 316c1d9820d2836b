"""Triton kernels of the layer-wise step. Free of torch and of layerlr; importing needs Triton.

| file | what it holds |
|---|---|
| `tables.py` | the tables that the kernels walk |
| `directions.py`, `rules.py` | the formulas of the C++ engine, one function each |
| `rows.py` | what is done once a tensor or layer: `begin`, `total`, `decide`, `finish` |
| `memory.py`, `codes.py` | elements between memory and registers; codes of 8 bits |
| `tiles.py` | the passes over the elements: `measure` or `advance`, then `apply` |
| `launches.py` | their order |
"""

from .directions import DIRECTIONS
from .launches import INTERPRETED, Blocks, Launch, Launches, Stored, launches
from .rules import RULES
from .tables import Tables

__all__ = [
    "DIRECTIONS",
    "INTERPRETED",
    "RULES",
    "Blocks",
    "Launch",
    "Launches",
    "Stored",
    "Tables",
    "launches",
]
