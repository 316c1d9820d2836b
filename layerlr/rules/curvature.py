"""Step sizes from the curvature along each layer's step."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from .rated import Estimated

Kind = Literal["hessian", "fisher", "finite-difference", "exact"]
Negative = Literal["absolute", "reuse"]
Likelihood = Literal["categorical", "bernoulli", "gaussian"]
Reduction = Literal["mean", "batchmean", "sum"]


@dataclasses.dataclass(frozen=True)
class Curvature(Estimated):
    """Minimise a quadratic model of the loss along each layer's step; use lr=1.

    With the step ``u`` (what is subtracted), the gradient ``g`` and the Hessian ``H`` of the loss,
    L2 decay included in both::

        C_lm = u_l.H u_m;  rho_l = g_l.u_l;  d_l = ((k_l + damping)*uu_l)^(-1/2)
        k_l^2 = mean over time of sum_m (d_m*C_lm/d_l)^2/uu_l^2
        a_l = rho_l / ((k_l + damping)*uu_l);  rate = a / max(1, a.C a/a.rho)
        w <- w - lr*rate*u

    k counts the layer's own curvature and, in squares, what steps of the other layers add to it
    that bend the loss as much (d: k so far; 1/|u| at first); then all rates shrink alike if their
    joint step would pass the minimum along it. One product ``H (s d u)`` with a random sign s a
    layer gives all of k_l^2 in the mean, another one ``a.C a``.

    Parameters
    ----------
    curvature
        ``"hessian"``: one signed Hessian-vector product. Gradients must carry their graph:
        ``loss.backward(create_graph=optimizer.is_second_order)``. ``"fisher"``: all of C from
        labels drawn from the model's output, as Gauss and Newton approximate it, without double
        backward; one more forward and backward pass over the last batch. ``"finite-difference"``:
        products from the gradient a little further; `step` needs the closure. ``"exact"``: all of
        C by a product for each layer. Fisher and finite differences need
        ``optimizer.attach(model)``.
    coupled
        False: ``a = rho/((|k| + damping)*uu)`` with k the mean of ``C_ll/uu``, each layer for
        itself, from one product ``H (s u)``: the block-diagonal model alone. Where layers overshoot
        together it diverges, as it did on the deep autoencoder of the benchmarks.
    damping
        Added to the curvature per unit of length, of each layer and of the joint step, >= 0.
    negative
        Where an estimate of the curvature is not positive: ``"absolute"`` takes its absolute
        value, ``"reuse"`` leaves it out of the mean and takes the last rate. An ascent direction
        (rho <= 0) or a rate without bound takes the last rate, or min_step where there is none.
    damped
        ``a = rho/(delta*(delta + rho))`` with ``delta = sqrt((k + damping)*uu)``, the step
        for self-concordant functions of the authors' earlier paper (after Gao & Goldfarb).
    warmup
        Steps over which new rates rise linearly to their full size, >= 0; default 0.
    min_step, max_step
        Bounds of a. max_step None: 0.1 where the direction scales its step to unit size (Adagrad,
        RMSprop, Adam, Lion); none where it is the gradient's (SGD): its rate has the unit of
        1/curvature.
    likelihood, reduction
        For ``"fisher"``: what the loss is. ``"categorical"``: `F.cross_entropy` of logits;
        ``"bernoulli"``: `F.binary_cross_entropy_with_logits`; ``"gaussian"``: `F.mse_loss`; with
        torch's ``reduction`` (``"batchmean"``: the sum over the batch size).
    ema, refresh, seed
        As in `Estimated`. The mean is of k^2 (of ``C_ll/uu`` where not coupled), which does not
        depend on the length of u. refresh=4 is about 1.8 times the cost of plain SGD.

    Notes
    -----
    For large batches: along steps of mini-batches of 64 the loss was least half a step away,
    whatever the rate, so exact minima would halve it again and again (``bench/papers/README.md``).

    The default lr of the classes is not 1: pass it. ``layers="module"`` takes weight and bias
    together. Parameters that ``adapt`` leaves out would take the plain step at lr = 1, so the rule
    governs all by default. A product costs about 1.5 gradients, there are two where an estimate is
    due (one if not coupled); then come the two passes of `Rated`. Gradients give up their graph in
    `step`; their values stay.

    References
    ----------
    Bahamou, Goldfarb: Layer-wise Adaptive Step-Sizes for Stochastic First-Order Methods for Deep
    Learning, 2023, arXiv:2305.13664. The abstract states the idea: curvature from the diagonal
    blocks of the Hessian, on SGD with momentum and AdamW, for about one more gradient. The rest is
    our reconstruction: signs, coupling, averaging, damping and guards.

    Examples
    --------
    >>> opt = layerlr.SGD(model.named_parameters(), lr=1.0, rule=Curvature("fisher"))
    >>> opt.attach(model)
    """

    curvature: Kind = "hessian"
    coupled: bool = True
    damping: float = 1e-3
    negative: Negative = "absolute"
    damped: bool = False
    warmup: int = 0
    min_step: float = 1e-6
    max_step: float | None = None
    likelihood: Likelihood = "categorical"
    reduction: Reduction = "mean"

    name = "curvature"

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "curvature": get_args(Kind),
            "negative": get_args(Negative),
            "likelihood": get_args(Likelihood),
            "reduction": get_args(Reduction),
        }
        for name, known in choices.items():
            self._check_choice(name, known)
        self._check("damping", lambda x: 0 <= x < math.inf, "a finite number >= 0")
        self._check("warmup", lambda x: isinstance(x, int) and x >= 0, "a whole number >= 0")
        self._check("min_step", lambda x: x >= 0, "a number >= 0")
        wanted = "None or a number >= min_step"
        self._check("max_step", lambda x: x is None or x >= self.min_step, wanted)
        for name in ("coupled", "damped"):
            self._check_choice(name, (True, False))

    @property
    def second_order(self) -> bool:  # type: ignore[override]
        """Whether gradients must carry their graph."""
        return self.curvature in ("hessian", "exact")
