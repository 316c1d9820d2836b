"""Step sizes from the curvature along each layer's step."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from .rated import Estimated

KINDS = ("hessian", "fisher", "finite-difference", "exact")
LIKELIHOODS = ("categorical", "bernoulli", "gaussian")
REDUCTIONS = ("mean", "batchmean", "sum")


@dataclasses.dataclass(frozen=True)
class Curvature(Estimated):
    """Minimise the block-diagonal quadratic model along each layer's step; use lr=1.

    With the step ``u`` (what is subtracted), gradient ``g`` and Hessian ``H`` of the loss, L2
    decay included in both::

        rho = g.u;  k = mean over time of u.Hu/u.u;  rate = rho / ((|k| + damping)*u.u)
        w <- w - lr*rate*u

    ``u.Hu`` is taken over the layer's own block of H, for all layers at once: with one random sign
    s a layer, ``s*u.(H(s u))`` has the block's value as its mean, since the signs of different
    layers cancel (the product with all of u would add the cross terms).

    Parameters
    ----------
    curvature
        ``"hessian"``: one signed Hessian-vector product. Gradients must carry their graph:
        ``loss.backward(create_graph=optimizer.is_second_order)``. ``"fisher"``: the Gauss-Newton
        block from labels drawn from the model's output, without double backward, never negative;
        one more forward and backward pass over the last batch. ``"finite-difference"``: of
        gradients at ``w`` and ``w + h s u``; `step` needs the closure. ``"exact"``: a product for
        each layer. Fisher and finite differences need ``optimizer.attach(model)``.
    damping
        Added to the curvature per unit of length, >= 0.
    negative
        Where the mean curvature is not positive: ``"absolute"`` takes its absolute value,
        ``"reuse"`` the last rate. An ascent direction (rho <= 0) always takes the last rate, or
        min_step where there is none.
    damped
        ``rate = rho/(delta*(delta + rho))`` with ``delta = sqrt((|k| + damping)*u.u)``, the step
        for self-concordant functions of the authors' earlier paper (after Gao & Goldfarb).
    warmup
        Steps over which rates rise linearly to their full size, >= 0.
    min_step, max_step
        Bounds of the rate before the warm-up. max_step None: 1 where the direction is first-order
        (SGD), else 0.1.
    likelihood, reduction
        For ``"fisher"``: what the loss is. ``"categorical"``: `F.cross_entropy` of logits;
        ``"bernoulli"``: `F.binary_cross_entropy_with_logits`; ``"gaussian"``: `F.mse_loss`; with
        torch's ``reduction`` (``"batchmean"``: the sum over the batch size).
    ema, refresh, seed
        As in `Estimated`. The mean is of ``u.Hu/u.u``, which does not depend on the length of u.

    Notes
    -----
    The default lr of the classes is not 1: pass it. ``layers="module"`` takes weight and bias
    together. Parameters that ``adapt`` leaves out would take the plain step at lr = 1, so the rule
    governs all by default. Costs about one more gradient where an estimate is due, a copy of the
    step and of the product, then the two passes of `Rated`. Gradients give up their graph in
    `step`; their values stay.

    References
    ----------
    Bahamou, Goldfarb: Layer-wise Adaptive Step-Sizes for Stochastic First-Order Methods for Deep
    Learning, 2023, arXiv:2305.13664. The abstract states the idea: curvature from the diagonal
    blocks of the Hessian, on SGD with momentum and AdamW, for about one more gradient. Signs,
    averaging, damping and guards are our reconstruction.
    """

    curvature: Literal["hessian", "fisher", "finite-difference", "exact"] = "hessian"
    damping: float = 1e-3
    negative: Literal["absolute", "reuse"] = "absolute"
    damped: bool = False
    warmup: int = 10
    min_step: float = 1e-6
    max_step: float | None = None
    likelihood: Literal["categorical", "bernoulli", "gaussian"] = "categorical"
    reduction: Literal["mean", "batchmean", "sum"] = "mean"

    name = "curvature"

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "curvature": KINDS,
            "negative": ("absolute", "reuse"),
            "likelihood": LIKELIHOODS,
            "reduction": REDUCTIONS,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            self._check(name, value, value in known, f"one of {', '.join(map(repr, known))}")
        self._check("damping", self.damping, 0 <= self.damping < math.inf, "a finite number >= 0")
        whole = isinstance(self.warmup, int) and self.warmup >= 0
        self._check("warmup", self.warmup, whole, "a whole number >= 0")
        self._check("min_step", self.min_step, self.min_step >= 0, "a number >= 0")
        most = self.max_step
        wanted = "None or a number >= min_step"
        self._check("max_step", most, most is None or most >= self.min_step, wanted)

    @property
    def second_order(self) -> bool:  # type: ignore[override]
        """Whether gradients must carry their graph."""
        return self.curvature in ("hessian", "exact")
