"""Rates of `layerlr.rules.BackMatching`.

| file | what it holds |
|---|---|
| `rates.py` | from each layer's number to its rate |
| `probe.py` | the number by one backward pass from random signs: any architecture |
| `structural.py` | the number along the traced graph of the model |
| `jacobian_traces.py`, `operations.py` | a formula for each operation of that graph |
"""

from .rates import estimate

__all__ = ["estimate"]
