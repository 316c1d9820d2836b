"""The public classes: torch.optim's constructors with a layer rule."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .directions import DIRECTIONS, Direction
from .layers import Adapt, LayerKey
from .optimizer import LayerwiseOptimizer, Rule
from .precision import Precision

OnNonfinite = Literal["skip", "propagate"] | None

_LAYERWISE_DOC = """\
    rule : str, layerlr.rules.LayerRule or None
        How each layer's rate is set: ``"singh"``, ``"layca"``, ``"lars"``, ``"lamb"``,
        ``"curvature"``, ``"backmatching"``, ``"rated"``, or a rule with its hyper-parameters.
        None: the torch.optim optimizer of the same name.
    layers : str or callable
        What forms a layer: ``"tensor"`` (each parameter), ``"module"`` (the parameters of a
        module; needs named parameters) or ``(name, param) -> key``.
    adapt : str, callable or None
        What the rule governs: ``"all"``, ``"kernels"`` (two dimensions or more) or
        ``(name, param) -> bool``. None: the rule's own choice (all for singh, else kernels). The
        other parameters take the plain step.
    backend : str
        ``"auto"`` takes the fastest that supports the case; a name that does not support it
        raises.
    on_nonfinite : str or None
        ``"skip"``: a layer whose gradient holds NaN or inf keeps its weights and its step count,
        the other layers go on (the default with a rule). ``"propagate"``: torch's way (the
        default without).
    max_grad_norm : float or None
        Clip gradients inside the step, as `torch.nn.utils.clip_grad_norm_` before it: times
        ``min(1, max_grad_norm / (n + 1e-6))``, n being the norm of all gradients of the groups
        where it is not None, found at ``optimizer.grad_norm`` after the step, on the device. A
        layer that is skipped counts nothing in it. ``.grad`` is left as it is. Costs another pass
        over the gradients, under sharding another message.
    precision : str or None
        How bfloat16 and float16 weights keep what rounding to nearest would lose (a step of less
        than half a unit in the last place); others step as without it. ``"master"``: a float32
        copy takes the steps, the weight is its rounding. ``"kahan"``: a second number of the
        weight's dtype holds what the first has lost, in float16 nothing below 2^-24.
        ``"stochastic"``: the weight is rounded up or down with probability in proportion, bfloat16
        only, by bits that follow from a seed in the state: `torch.initial_seed` or the group key
        ``seed``. None: rounded to nearest. Of memory they take 4, 2, 0 and 0 bytes a weight; a
        pass over the weights reads 6, 4, 2 and 2, a step writes as many. See `layerlr.precision`.

    Notes
    -----
    ``foreach`` and ``fused`` are checked as torch does and never change the numbers; with
    ``fused=True`` the step divides a `torch.amp.GradScaler`'s scale out itself, without an extra
    pass, and does nothing at all where an overflow was found, without asking the device. State and
    arithmetic are float32 for parameters of lower precision. The param-group keys ``split`` and
    ``lr_scale`` are described at `layerlr.optimizer.LayerwiseOptimizer`.
"""


def _documented(cls: type) -> type:
    cls.__doc__ = (cls.__doc__ or "").rstrip() + "\n" + _LAYERWISE_DOC
    return cls


def _check_lr(lr: float | Tensor) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")


def _check(name: str, value: Any) -> None:
    if not value >= 0.0:
        raise ValueError(f"Invalid {name} value: {value}")


@_documented
class SGD(LayerwiseOptimizer):
    """SGD, with momentum, Nesterov momentum and a layer rule.

    ``m <- mu*m + (1-dampening)*f*g;  w <- w - lr*m``; Nesterov: ``w <- w - lr*(f*g + mu*m)``. f is
    the factor of a rule in gradient order; a rule in update order scales the step instead.
    Arguments as in `torch.optim.SGD`; the first step is not dampened, as there.

    Parameters
    ----------
    params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable
        As in torch; weight decay is L2.
    fused
        As in torch.
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
        rule: Rule = None,
        layers: str | LayerKey = "tensor",
        adapt: str | Adapt | None = None,
        backend: str = "auto",
        on_nonfinite: OnNonfinite = None,
        max_grad_norm: float | None = None,
        precision: Precision = None,
    ) -> None:
        _check_lr(lr)
        _check("momentum", momentum)
        _check("weight_decay", weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "capturable": capturable,
        }
        super().__init__(
            params, defaults, rule, layers, adapt, backend, on_nonfinite, max_grad_norm, precision
        )

    def direction(self, group: dict[str, Any]) -> Direction:
        if group["momentum"] == 0:
            return DIRECTIONS["sgd"]
        return DIRECTIONS["nesterov" if group["nesterov"] else "momentum"]


@_documented
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
        rule: Rule = None,
        layers: str | LayerKey = "tensor",
        adapt: str | Adapt | None = None,
        backend: str = "auto",
        on_nonfinite: OnNonfinite = None,
        max_grad_norm: float | None = None,
        precision: Precision = None,
    ) -> None:
        _check_lr(lr)
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"Invalid momentum value: {momentum}")
        _check("weight_decay", weight_decay)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "capturable": capturable,
        }
        super().__init__(
            params, defaults, rule, layers, adapt, backend, on_nonfinite, max_grad_norm, precision
        )

    def direction(self, group: dict[str, Any]) -> Direction:
        return DIRECTIONS["averaged_momentum"]


@_documented
class Adagrad(LayerwiseOptimizer):
    """Adagrad.

    ``s <- s + g^2;  w <- w - lr/(1 + (t-1)*lr_decay) * f * g/(sqrt(s) + eps)``, s from the raw
    gradient. Arguments as in `torch.optim.Adagrad`.

    Parameters
    ----------
    params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, foreach, maximize
        As in torch; weight decay is L2.
    differentiable, fused
        As in torch.
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
        rule: Rule = None,
        layers: str | LayerKey = "tensor",
        adapt: str | Adapt | None = None,
        backend: str = "auto",
        on_nonfinite: OnNonfinite = None,
        max_grad_norm: float | None = None,
        precision: Precision = None,
    ) -> None:
        _check_lr(lr)
        _check("lr_decay", lr_decay)
        _check("weight_decay", weight_decay)
        _check("initial_accumulator_value", initial_accumulator_value)
        _check_eps(eps)
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
            "capturable": capturable,
        }
        super().__init__(
            params, defaults, rule, layers, adapt, backend, on_nonfinite, max_grad_norm, precision
        )

    def direction(self, group: dict[str, Any]) -> Direction:
        return DIRECTIONS["adagrad"]

    def share_memory(self) -> None:
        """Move the state sums to shared memory."""
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.state:  # a frozen parameter has none
                    self.state[p]["sum"].share_memory_()


@_documented
class RMSprop(LayerwiseOptimizer):
    """RMSprop, plain, centered, with momentum or both.

    ``v <- a*v + (1-a)*g^2;  w <- w - lr * f * g/(sqrt(v) + eps)``, v from the raw gradient.
    Arguments as in `torch.optim.RMSprop`.

    Parameters
    ----------
    params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize
        As in torch; weight decay is L2.
    differentiable
        As in torch.
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
        *,
        rule: Rule = None,
        layers: str | LayerKey = "tensor",
        adapt: str | Adapt | None = None,
        backend: str = "auto",
        on_nonfinite: OnNonfinite = None,
        max_grad_norm: float | None = None,
        precision: Precision = None,
    ) -> None:
        _check_lr(lr)
        _check_eps(eps)
        _check("momentum", momentum)
        _check("weight_decay", weight_decay)
        _check("alpha", alpha)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(
            params, defaults, rule, layers, adapt, backend, on_nonfinite, max_grad_norm, precision
        )

    def direction(self, group: dict[str, Any]) -> Direction:
        name = "rmsprop_centered" if group["centered"] else "rmsprop"
        if group["momentum"] > 0:
            name += "_momentum"
        return DIRECTIONS[name]


@_documented
class Adam(LayerwiseOptimizer):
    """Adam.

    ``m <- b1*m + (1-b1)*g;  v <- b2*v + (1-b2)*g^2;  w <- w - lr * f * m_hat/(sqrt(v_hat) + eps)``,
    both moments from the raw gradient. Arguments as in `torch.optim.Adam`.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, amsgrad, foreach, maximize, capturable, differentiable
        As in torch; weight decay is L2 unless ``decoupled_weight_decay``.
    fused, decoupled_weight_decay
        As in torch.
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
        rule: Rule = None,
        layers: str | LayerKey = "tensor",
        adapt: str | Adapt | None = None,
        backend: str = "auto",
        on_nonfinite: OnNonfinite = None,
        max_grad_norm: float | None = None,
        precision: Precision = None,
    ) -> None:
        if isinstance(lr, Tensor) and foreach and not capturable:
            raise ValueError(
                "lr as a Tensor is not supported for capturable=False and foreach=True"
            )
        _check_lr(lr)
        _check_eps(eps)
        betas = _checked_betas(betas, foreach, capturable)
        _check("weight_decay", weight_decay)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(
            params, defaults, rule, layers, adapt, backend, on_nonfinite, max_grad_norm, precision
        )

    def direction(self, group: dict[str, Any]) -> Direction:
        return DIRECTIONS["amsgrad" if group["amsgrad"] else "adam"]

    def decoupled(self, group: dict[str, Any]) -> bool:
        return bool(group["decoupled_weight_decay"])


@_documented
class AdamW(Adam):
    """Adam with decoupled weight decay.

    ``w <- (1 - lr*weight_decay)*w - lr * f * m_hat/(sqrt(v_hat) + eps)``. Rules in update order see
    ``u + weight_decay*w`` instead. Arguments as in `torch.optim.AdamW`.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable
        As in torch.
    fused
        As in torch.
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
        rule: Rule = None,
        layers: str | LayerKey = "tensor",
        adapt: str | Adapt | None = None,
        backend: str = "auto",
        on_nonfinite: OnNonfinite = None,
        max_grad_norm: float | None = None,
        precision: Precision = None,
    ) -> None:
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
            rule=rule,
            layers=layers,
            adapt=adapt,
            backend=backend,
            on_nonfinite=on_nonfinite,
            max_grad_norm=max_grad_norm,
            precision=precision,
        )


def _check_eps(eps: float) -> None:
    if not eps >= 0.0:
        raise ValueError(f"Invalid epsilon value: {eps}")


def _checked_betas(
    betas: tuple[float | Tensor, float | Tensor], foreach: bool | None, capturable: bool
) -> tuple[float, float]:
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    kinds = {isinstance(beta, Tensor) for beta in betas}
    if len(kinds) != 1 or not all(isinstance(beta, (float, Tensor)) for beta in betas):
        raise ValueError("betas must be either both floats or both Tensors")
    for i, beta in enumerate(betas):
        if isinstance(beta, Tensor):
            if foreach and not capturable:
                raise ValueError(
                    f"betas[{i}] as a Tensor is not supported for capturable=False and foreach=True"
                )
            if beta.numel() != 1:
                raise ValueError(f"Tensor betas[{i}] must be 1-element")
    return float(betas[0]), float(betas[1])
