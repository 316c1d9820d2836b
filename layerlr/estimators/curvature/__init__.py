"""Step sizes of `layerlr.rules.Curvature`.

| file | what it holds |
|---|---|
| `rates.py` | from the curvature along each layer's step to its rate |
| `hessian.py` | the default: products by a backward pass through the gradients |
| `finite_difference.py` | the same from gradients a little way off |
| `fisher.py` | the curvature from labels that the model's own output draws |
| `forward_products.py`, `module_products.py` | derivatives of the modules along a direction |
"""

from .rates import estimate

__all__ = ["estimate"]
