"""Lion, and with equal betas signSGD with momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from layerlr import checks
from layerlr.directions import DIRECTIONS, Direction
from layerlr.optimizer import LayerwiseOptimizer
from layerlr.options import LayerwiseOptions, documented

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of typing in Python 3.11


@documented
class Lion(LayerwiseOptimizer):
    """Lion: the sign of an average of gradient and momentum.

    ``u = sign(b1*m + (1-b1)*g);  m <- b2*m + (1-b2)*g;  w <- (1 - lr*weight_decay)*w - lr * f * u``
    (Chen et al. 2023, arXiv:2302.06675, Algorithm 2). Rules in update order see
    ``u + weight_decay*w`` instead. ``betas=(b, b)`` is signSGD with momentum (Signum, Bernstein et
    al. 2018, arXiv:1802.04434): u is the sign of the new m.

    u is formed from the new m, as ``sign(b1/b2*m + (1 - b1/b2)*g)``, which is the same number but
    for rounding: where the two terms cancel all but a few roundings, the sign may be another
    than that of an implementation which takes the old m. The sign of 0 is 0, that of NaN is NaN.
    After an infinite gradient u is NaN where b1 is 0 or at least b2.

    Parameters
    ----------
    params : iterable
        Parameters, pairs of name and parameter, or param groups.
    lr : float or Tensor
        Every weight moves by it without a rule: a third to a tenth of AdamW's.
    betas : tuple of float or Tensor
        b1 in [0, 1), b2 in (0, 1).
    weight_decay : float
        Decoupled weight decay: three to ten times AdamW's.
    maximize, foreach, differentiable, fused, capturable
        As in `torch.optim.AdamW`.

    Examples
    --------
    >>> opt = layerlr.Lion(model.named_parameters(), lr=1e-4, weight_decay=0.1)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        **layerwise: Unpack[LayerwiseOptions],
    ) -> None:
        checks.lr(lr)
        betas = checks.betas(betas, foreach, capturable)
        DIRECTIONS["lion"].hyper({"betas": betas})  # refuses what a group may not hold either
        checks.at_least_zero("weight_decay", weight_decay)
        defaults = dict[str, Any](lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize)
        defaults |= dict(foreach=foreach, differentiable=differentiable, fused=fused)
        defaults |= dict(capturable=capturable)
        super().__init__(params, defaults, layerwise)

    def direction(self, group: dict[str, Any]) -> Direction:
        return DIRECTIONS["lion"]

    def decoupled(self, group: dict[str, Any]) -> bool:
        return True
