"""Rates from back-matching propagation."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from .rated import Estimated


@dataclasses.dataclass(frozen=True)
class BackMatching(Estimated):
    """``w <- w - lr*rate*u``, ``rate = 1/(c_W*m)``, rescaled to a common mean.

    Back-matching asks each layer to match, in least squares, the value that is wanted of its
    output. With every Gram matrix ``J^T J`` of the layer's Jacobians replaced by the scalar
    ``c = ||J||_F^2/dim`` nearest to it, the wanted change of the weights is the gradient over
    ``c_W*m``, ``m`` being the product of the ``c_x`` of the layers above (sums over the branches
    of a residual connection).

    Parameters
    ----------
    estimator
        ``"structural"``: ``c_W`` and ``c_x`` of each module in closed form, from a traced graph of
        the model and one more forward pass. Knows Linear, Conv1d/2d, BatchNorm, elementwise
        activations, pooling, flatten, dropout and residual sums. ``"probe"``: one more forward and
        backward pass with random signs v at the output; ``||J^T v||^2/(batch*dim)`` is an unbiased
        estimate of the trace of the composed Gram matrix over its dimension, for any architecture.
    dimension
        Of ``"structural"``: ``c_x`` is the trace over the input's dimension (``"dim"``), or over
        the rank of the Jacobian (``"rank"``), which the least-squares solution of smallest norm
        suggests.
    normalize
        ``"mean"``: the geometric mean of the rates is 1; ``"last"``: that of the last layer (in
        parameter order, of all groups) is; None: rates as they are.
    min_factor, max_factor
        Bounds of a rate, after the rescaling.
    ema, refresh, seed
        As in `Estimated`. The mean is of ``c_W*m``.

    Notes
    -----
    A layer that the output has not depended on yet (behind a scale that starts at 0; to the probe,
    a bias before a batch norm) has the geometric mean of the other layers' rates.

    Needs ``optimizer.attach(model)``. Momentum lies inside the scaled step, as lr does in torch.
    The rates change slowly: refresh=10 costs a tenth of a forward (structural) or forward and
    backward (probe) pass a step. Then the two passes of `Rated`.

    References
    ----------
    Zhang, Chen, Liu: Train Feedforward Neural Network with Layer-wise Adaptive Rate via
    Approximating Back-matching Propagation, 2018, arXiv:1802.09750. The abstract states the
    matching in least squares and that its approximation is SGD with layer-wise rates; the scalars,
    their composition, the probe, the rescaling and the bounds are our derivation.

    Examples
    --------
    >>> opt = layerlr.SGD(model.named_parameters(), lr=0.1, rule=BackMatching())
    >>> opt.attach(model)
    """

    estimator: Literal["structural", "probe"] = "structural"
    dimension: Literal["dim", "rank"] = "dim"
    normalize: Literal["mean", "last"] | None = "mean"
    min_factor: float = 1e-3
    max_factor: float = 1e3
    refresh: int = dataclasses.field(default=10, kw_only=True)

    name = "backmatching"

    def __post_init__(self) -> None:
        super().__post_init__()
        choices: dict[str, tuple[object, ...]] = {
            "estimator": ("structural", "probe"),
            "dimension": ("dim", "rank"),
            "normalize": ("mean", "last", None),
        }
        for name, known in choices.items():
            self._check_choice(name, known)
        self._check("min_factor", lambda x: 0 < x <= 1, "a number in (0, 1]")
        self._check("max_factor", lambda x: 1 <= x <= math.inf, "a number >= 1")
