"""Optimizers that divide by the root of a second moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from layerlr import checks, codes
from layerlr.directions import DIRECTIONS, Direction
from layerlr.optimizer import LayerwiseOptimizer
from layerlr.options import LayerwiseOptions, documented, refuse_unknown

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of typing in Python 3.11


@documented
class Adagrad(LayerwiseOptimizer):
    """Adagrad.

    ``s <- s + g^2;  w <- w - lr/(1 + (t-1)*lr_decay) * f * g/(sqrt(s) + eps)``, s from the raw
    gradient.

    Parameters
    ----------
    params, lr, ...
        The arguments of `torch.optim.Adagrad`, as there; weight decay is L2.

    Examples
    --------
    >>> opt = layerlr.Adagrad(model.named_parameters(), lr=0.004, rule="singh")
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        **layerwise: Unpack[LayerwiseOptions],
    ) -> None:
        checks.lr(lr)
        checks.at_least_zero("lr_decay", lr_decay)
        checks.at_least_zero("weight_decay", weight_decay)
        checks.at_least_zero("initial_accumulator_value", initial_accumulator_value)
        checks.eps(eps)
        defaults = dict[str, Any](lr=lr, lr_decay=lr_decay, eps=eps, weight_decay=weight_decay)
        defaults |= dict(initial_accumulator_value=initial_accumulator_value, foreach=foreach)
        defaults |= dict(maximize=maximize, differentiable=differentiable, fused=fused)
        defaults |= dict(capturable=capturable)
        super().__init__(params, defaults, layerwise)

    def direction(self, group: dict[str, Any]) -> Direction:
        return DIRECTIONS["adagrad"]

    def share_memory(self) -> None:
        """Move the state sums to shared memory, and the scales of those in 8 bits."""
        for group in self.param_groups:
            for p in group["params"]:
                for key in ("sum", codes.scale_key("sum")):
                    if key in self.state.get(p, ()):  # a frozen parameter has no state
                        self.state[p][key].share_memory_()


@documented
class RMSprop(LayerwiseOptimizer):
    """RMSprop, plain, centered, with momentum or both.

    ``v <- a*v + (1-a)*g^2;  w <- w - lr * f * g/(sqrt(v) + eps)``, v from the raw gradient.

    Parameters
    ----------
    params, lr, ...
        The arguments of `torch.optim.RMSprop`, as there; weight decay is L2.

    Examples
    --------
    >>> opt = layerlr.RMSprop(model.named_parameters(), lr=3**-3, rule="layca")
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **layerwise: Unpack[LayerwiseOptions],
    ) -> None:
        checks.lr(lr)
        checks.eps(eps)
        checks.at_least_zero("momentum", momentum)
        checks.at_least_zero("weight_decay", weight_decay)
        checks.at_least_zero("alpha", alpha)
        defaults = dict[str, Any](lr=lr, momentum=momentum, alpha=alpha, eps=eps, centered=centered)
        defaults |= dict(weight_decay=weight_decay, capturable=capturable, foreach=foreach)
        defaults |= dict(maximize=maximize, differentiable=differentiable)
        super().__init__(params, defaults, layerwise)

    def direction(self, group: dict[str, Any]) -> Direction:
        name = "rmsprop_centered" if group["centered"] else "rmsprop"
        if group["momentum"] != 0:
            name += "_momentum"
        return DIRECTIONS[name]


@documented
class Adam(LayerwiseOptimizer):
    """Adam.

    ``m <- b1*m + (1-b1)*g;  v <- b2*v + (1-b2)*g^2;  w <- w - lr * f * m_hat/(sqrt(v_hat) + eps)``,
    both moments from the raw gradient.

    Parameters
    ----------
    params, lr, ...
        The arguments of `torch.optim.Adam`, as there; weight decay is L2 unless
        ``decoupled_weight_decay``.

    Examples
    --------
    >>> opt = layerlr.Adam(layerlr.param_groups(model), lr=2**-6, plain_lr=2**-8, rule="hyperball")
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **layerwise: Unpack[LayerwiseOptions],
    ) -> None:
        if isinstance(lr, Tensor) and foreach and not capturable:
            raise ValueError(
                "lr as a Tensor is not supported for capturable=False and foreach=True"
            )
        checks.lr(lr)
        checks.eps(eps)
        betas = checks.betas(betas, foreach, capturable)
        checks.at_least_zero("weight_decay", weight_decay)
        defaults = dict[str, Any](lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        defaults |= dict(amsgrad=amsgrad, maximize=maximize, foreach=foreach, capturable=capturable)
        defaults |= dict(differentiable=differentiable, fused=fused)
        defaults |= dict(decoupled_weight_decay=decoupled_weight_decay)
        super().__init__(params, defaults, layerwise)

    def direction(self, group: dict[str, Any]) -> Direction:
        return DIRECTIONS["amsgrad" if group["amsgrad"] else "adam"]

    def decoupled(self, group: dict[str, Any]) -> bool:
        return bool(group["decoupled_weight_decay"])


@documented
class AdamW(Adam):
    """Adam with decoupled weight decay.

    ``w <- (1 - lr*weight_decay)*w - lr * f * m_hat/(sqrt(v_hat) + eps)``. Rules in update order see
    ``u + weight_decay*w`` instead.

    Parameters
    ----------
    params, lr, ...
        The arguments of `torch.optim.AdamW`, as there.

    Examples
    --------
    >>> opt = layerlr.AdamW(model.named_parameters(), lr=2**-6, weight_decay=0.1, rule="lamb")
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **layerwise: Unpack[LayerwiseOptions],
    ) -> None:
        refuse_unknown(type(self), layerwise)  # decoupled_weight_decay, for one
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **layerwise,
        )
