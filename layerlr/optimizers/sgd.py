"""SGD with the usual momentum and with an averaged one."""

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
class SGD(LayerwiseOptimizer):
    """SGD, with momentum, Nesterov momentum and a layer rule.

    ``m <- mu*m + (1-dampening)*f*g;  w <- w - lr*m``; Nesterov: ``w <- w - lr*(f*g + mu*m)``. f is
    the factor of a rule in gradient order; a rule in update order scales the step instead.
    The first step is not dampened, as in torch.

    Parameters
    ----------
    params, lr, ...
        The arguments of `torch.optim.SGD`, as there; weight decay is L2.

    Examples
    --------
    >>> opt = layerlr.SGD(model.named_parameters(), lr=3**-3, momentum=0.9, rule="layca")
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        **layerwise: Unpack[LayerwiseOptions],
    ) -> None:
        checks.lr(lr)
        checks.at_least_zero("momentum", momentum)
        checks.number("dampening", dampening)
        checks.at_least_zero("weight_decay", weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        defaults = dict[str, Any](lr=lr, momentum=momentum, dampening=dampening, fused=fused)
        defaults |= dict(weight_decay=weight_decay, nesterov=nesterov, maximize=maximize)
        defaults |= dict(foreach=foreach, differentiable=differentiable, capturable=capturable)
        super().__init__(params, defaults, layerwise)

    def direction(self, group: dict[str, Any]) -> Direction:
        if group["momentum"] == 0:
            return DIRECTIONS["sgd"]
        return DIRECTIONS["nesterov" if group["nesterov"] else "momentum"]


@documented
class AMomSGD(LayerwiseOptimizer):
    """SGD with averaged momentum.

    ``m <- mu*m + (1-mu)*g;  w <- w - lr*m``, from m = 0 and without bias correction (SGD_AMom of
    the Layca paper, arXiv:1806.01603).

    Parameters
    ----------
    params, lr, maximize, foreach, differentiable, fused
        As in `torch.optim.SGD`.
    momentum : float
        mu in [0, 1].
    weight_decay : float
        L2 coefficient.

    Examples
    --------
    >>> opt = layerlr.AMomSGD(model.named_parameters(), lr=3**-3, momentum=0.9, rule="layca")
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        **layerwise: Unpack[LayerwiseOptions],
    ) -> None:
        checks.lr(lr)
        checks.average("momentum", momentum)
        checks.at_least_zero("weight_decay", weight_decay)
        defaults = dict[str, Any](lr=lr, momentum=momentum, weight_decay=weight_decay)
        defaults |= dict(maximize=maximize, foreach=foreach, differentiable=differentiable)
        defaults |= dict(fused=fused, capturable=capturable)
        super().__init__(params, defaults, layerwise)

    def direction(self, group: dict[str, Any]) -> Direction:
        return DIRECTIONS["averaged_momentum"]
