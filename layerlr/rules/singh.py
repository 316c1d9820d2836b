"""The rule of Singh et al. 2015."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .base import LayerRule, LayerStats


@dataclasses.dataclass(frozen=True)
class Singh(LayerRule):
    """``f = 1 + log(1 + 1/|g|)``: small gradients get a larger rate.

    The norm is over the whole layer and taken of the gradient that is used, after L2 decay. The
    factor is always above 1; for a layer whose gradient is exactly zero it is infinite, and the
    step is 0. First-order buffers (SGD momentum, Nesterov, averaged momentum) see ``f*g`` as in
    Caffe; for Adagrad, RMSprop, Adam and Lion the factor multiplies the step.

    Notes
    -----
    Computed as ``1 + log((1 + n)/n)``, n being the root of a float64 sum: at least 2e-162, so that
    nothing overflows. Two passes over memory, the first over the gradient alone (24 bytes per
    float32 parameter on SGD with momentum). The paper's layer is a module, weight and bias
    together: ``layers="module"``.

    References
    ----------
    Singh, De, Zhang, Goldstein, Taylor: Layer-Specific Adaptive Learning Rates for Deep Networks,
    2015, arXiv:1510.04609, equation 9.

    Examples
    --------
    >>> opt = layerlr.SGD(model.named_parameters(), lr=0.1, layers="module", rule="singh")
    """

    name = "singh"
    order = "gradient"
    adapts = "all"

    def factor(self, s: LayerStats, lr: Tensor, weight_decay: float) -> Tensor:
        n = s.gg.sqrt()
        return torch.where(n > 0, 1.0 + torch.log((1.0 + n) / n), 0.0)
