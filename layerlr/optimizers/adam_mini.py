"""Adam with one second moment a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from layerlr import checks, rules
from layerlr.directions import FIRST_MOMENT, Direction
from layerlr.optimizer import LayerwiseOptimizer
from layerlr.options import LayerwiseOptions, documented

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of typing in Python 3.11


@documented
class AdamMini(LayerwiseOptimizer):
    """Adam-mini: AdamW with one second moment for each layer instead of one for each weight.

    ::

        m <- b1*m + (1-b1)*g;  v <- b2*v + (1-b2)*(g.g)/n  of each layer of n weights
        w <- (1 - lr*weight_decay)*w - lr*m_hat/(sqrt(v_hat) + eps)

    (Zhang et al. 2024, arXiv:2406.16793, Algorithm 1.) Of state there are 4 bytes a weight instead
    of AdamW's 8; a step takes as many bytes as AdamW's, 28 a float32 weight, in two passes.

    Layers are what ``layers`` and the group key ``split`` make of the parameters. The paper wants
    each head for queries and keys (``split``: the number of heads), each row for embeddings and
    output layer, each output neuron for values, projections and MLPs (``split``: the number of
    rows), and the whole tensor for the rest, such as norms and biases (no ``split``)::

        layerlr.AdamMini(
            [
                {"params": queries_and_keys, "split": heads},  # of a fused qkv: a group of its own
                {"params": matrices_of_768_rows, "split": 768},
                {"params": the_rest},
            ],
            lr=1e-3,
        )

    The authors' code gives embeddings and output layer an Adam of their own instead: do so with
    `layerlr.AdamW`. Each layer costs some time of its own, so one a row of a large matrix is not
    free. Whole tensors throughout are what the paper found unstable in large transformers.

    Parameters
    ----------
    params : iterable
        Parameters, pairs of name and parameter, or param groups.
    lr : float or Tensor
        AdamW's, as a rule.
    betas : tuple of float or Tensor
        In [0, 1).
    eps : float
        >= 0.
    weight_decay : float
        Decoupled weight decay.
    maximize, foreach, differentiable, fused, capturable
        As in `torch.optim.AdamW`.

    Notes
    -----
    ``optimizer.state[p]["second_moment"]`` has a float64 number for each layer that begins in p,
    v_hat, below 0 before the first step: state dicts of AdamW load, and v begins anew. A layer that
    is skipped (``on_nonfinite``) keeps its own. In a layer of several parameters, weights without a
    gradient count as if it were zero.

    It is a rule already, of every parameter: it takes no ``rule``, ``adapt`` or ``plain_lr``.
    `layerlr.wrap` puts rules on it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **layerwise: Unpack[LayerwiseOptions],
    ) -> None:
        checks.lr(lr)
        checks.eps(eps)
        betas = checks.betas(betas, foreach, capturable)
        checks.at_least_zero("weight_decay", weight_decay)
        defaults = dict[str, Any](lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        defaults |= dict(maximize=maximize, foreach=foreach, differentiable=differentiable)
        defaults |= dict(fused=fused, capturable=capturable)
        super().__init__(params, defaults, layerwise)

    def direction(self, group: dict[str, Any]) -> Direction:
        return FIRST_MOMENT

    def decoupled(self, group: dict[str, Any]) -> bool:
        return True

    def rule(self, group: dict[str, Any]) -> rules.LayerRule:
        """Its own."""
        given = rules.resolve(group["rule"])
        if not (given is None or isinstance(given, rules.AdamMini)):
            raise ValueError(
                f"AdamMini takes no rule, got {given!r}: it is one; use layerlr.AdamW, or "
                "layerlr.wrap to put a rule on it"
            )
        for key, all_there_is in (("adapt", (None, "all")), ("plain_lr", (None,))):
            if group[key] not in all_there_is:
                raise ValueError(
                    f"AdamMini has a second moment for every layer and no plain step, got {key}="
                    f"{group[key]!r}: leave it out, and give other parameters to layerlr.AdamW"
                )
        return rules.AdamMini()
