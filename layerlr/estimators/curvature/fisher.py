"""Curvature along a direction from labels that the model's own output draws: no double backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from layerlr.estimators.layers import LayerSet, generator
from layerlr.estimators.replay import (
    ModelReplay,
    output_tensor,
    random_state,
    refuse_reentrant,
    set_random_state,
)
from layerlr.rules import Curvature
from layerlr.rules.curvature import Likelihood, Reduction

from .forward_products import ForwardProducts
from .module_products import Tangent, eager, owned_by


def matrix(rule: Curvature, layers: LayerSet, model: ModelReplay) -> Tensor:
    """``u_l^T F u_m`` of all layers, from the products of each sample."""
    steps = {p: u for p, u in zip(layers.params(), layers.steps, strict=True)}
    tangents = []
    for p, begin, end, layer in layers.parts():
        value = steps[p].to(p.dtype)
        if p.dim() and end - begin < p.shape[0]:
            value = torch.zeros_like(p)
            value[begin:end] = steps[p][begin:end]
        tangents.append(Tangent(p, value, layer))
    draw = generator(rule.seed, layers.step, layers.device)
    with model.replay() as (args, kwargs):
        rows = products(
            model.model,
            args,
            kwargs,
            tangents,
            len(layers),
            rule.likelihood,
            rule.reduction,
            draw,
        ).to(layers.device)
    return rows @ rows.mT


def products(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tangents: Sequence[Tangent],
    layers: int,
    likelihood: Likelihood,
    reduction: Reduction,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Rows of S, a root of the Fisher matrix F along the directions: ``E S S^T = (d_l^T F d_m)``.

    With J_i the Jacobian of sample i's output, r_i the gradient of its terms of the loss at labels
    drawn from the output itself, and M the number by which the reduction divides::

        S_li = r_i^T J_i d_l / sqrt(M);  c_l = sum_i S_li^2

    The draws have E r_i = 0 and E r_i r_i^T = H_i, the Hessian of the terms in the output (each
    loss below is minus a log-likelihood), so ``E c_l = d_l^T (sum_i J_i^T H_i J_i / M) d_l``, the
    Gauss-Newton block of the loss. Positions of one sample are drawn independently, so their cross
    terms vanish in the mean as well. In gradients of the reduced loss, g'_i = J_i^T r_i / M, the
    same number is ``M * sum_i (g'_i.d_l)^2``; the sum is what we propagate, out of the way of
    underflow in half precision.

    For S_li, each call of a module that owns parameters gives the derivative dy of its output along
    d_l in forward mode, and S_li sums ``(dL/dy * dy)`` over the sample, before squaring also over
    the calls and the parameters of the layer.

    Parameters
    ----------
    model, args, kwargs
        What to run again, within `ModelReplay.replay`: the pass moves buffers and random states.
    tangents
        The directions. Several may share a parameter, in one layer or in several.
    layers
        How many layers there are.
    likelihood
        ``"categorical"``: the output holds logits over dim 1, the loss is ``F.cross_entropy``.
        ``"bernoulli"``: logits, ``F.binary_cross_entropy_with_logits``.
        ``"gaussian"``: the loss is ``F.mse_loss``, so the variance is 1/2.
        Weights, ignored labels and label smoothing are not known here.
    reduction
        What divides the loss. ``"mean"``: every term, M is the number of samples and positions
        (of elements unless categorical). ``"batchmean"``: the samples. ``"sum"``: nothing, M = 1.
    generator
        Of the labels, on the output's device. None takes the default one, which replay sets to
        the same state at each step of a program that draws nothing else: then the errors of
        successive steps are not independent.

    Returns
    -------
    Tensor
        S, float64 of shape [layers, samples], on the output's device. A layer on which the output
        does not depend has zeros.

    Raises
    ------
    TypeError
        Where the model's output is not one floating-point tensor (or its ``logits``), a module
        changes its input in place, or uses its parameters with and without the batch in dim 0.
    ValueError
        For an unknown likelihood or reduction, a tangent that is no parameter of the model, or a
        parameter that is used both by its module and past it.
    RuntimeError
        Where parts of the model are checkpointed with ``use_reentrant=True``.
    NotImplementedError
        Where PyTorch can differentiate a module neither in forward mode nor twice.

    Notes
    -----
    Dim 0 of the output is the batch. A module whose single output has another dim 0 (windows,
    time first, a table of positions), or that is never called (``MultiheadAttention.out_proj``),
    leaves its parameters to the smallest module around it that fits, in the end the model. Dim 0
    is all that can be seen: time first with as many steps as samples goes unnoticed.

    BatchNorm in train mode couples the samples: one sample's S_li then includes what the others
    lose through it, cross terms remain, and the estimate is biased (without samples that couple
    it is not). The Hessian's term that the Fisher matrix leaves out is left out here too.

    One forward pass, one product like the module's own forward for each layer, and a backward
    pass that skips the weights' gradients. A module outside the plain ones of torch.nn costs two
    of its forward passes for each of its layers, also when it stands in for one inside it. One
    more forward pass where the first tensor in the arguments does not have the output's dim 0.

    References
    ----------
    Bahamou, Goldfarb: Layer-wise adaptive step-sizes for stochastic first-order methods for deep
    learning, arXiv:2305.13664, uses diagonal blocks of the Hessian. Fisher in their place and
    the products without per-sample gradients are our derivation.
    """
    for name, value, kinds in (
        ("likelihood", likelihood, Likelihood),
        ("reduction", reduction, Reduction),
    ):
        if value not in get_args(kinds):
            raise ValueError(f"Invalid {name}: {value!r}, wanted one of {get_args(kinds)}")
    owned = owned_by(model, tangents)
    first = next(
        (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()), None
    )
    n = first.shape[0] if first is not None else -1
    state = random_state()
    with torch.enable_grad(), eager(model):
        while True:
            taps = ForwardProducts(model, owned, tangents, layers, n)
            with taps.installed():
                frame = taps.enter(model, args, kwargs)
                output = output_tensor(model(*args, **kwargs))
                refuse_reentrant(output)
                if output.shape[0] == n:
                    residual = _residual(output, likelihood, generator)
                    sums = taps.collect(frame, args, kwargs, output, residual)
                    break
            n = output.shape[0]
            set_random_state(state)
    terms = output.numel() // (output.shape[1] if likelihood == "categorical" else 1)
    divisor = {"mean": terms, "batchmean": n, "sum": 1}[reduction]
    return torch.stack([s.to(output.device).double().flatten() for s in sums]) / divisor**0.5


def _residual(output: Tensor, likelihood: str, generator: torch.Generator | None) -> Tensor:
    """Gradient of the summed loss in the output at drawn labels; its covariance is the Hessian."""
    x = output.detach()
    x = x if x.dtype == torch.float64 else x.float()
    if likelihood == "categorical":
        if x.dim() < 2:
            raise TypeError(
                f"the model's output has shape {tuple(x.shape)}, wanted [N, C] or [N, C, ...]"
            )
        p = x.softmax(1)
        drawn = _draw(p, generator).unsqueeze(1)
        return p.scatter_add(1, drawn, torch.full_like(p[:, :1], -1.0)).to(output.dtype)
    if likelihood == "bernoulli":
        p = x.sigmoid()
        coins = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generator)
        return (p - (coins < p).to(p.dtype)).to(output.dtype)
    noise = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return noise.normal_(0.0, 2.0**0.5, generator=generator).to(output.dtype)


def _draw(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """Classes by the probabilities in dim 1 (multinomial would abort a GPU's process on NaN)."""
    clocks = torch.empty(p.shape, dtype=p.dtype, device=p.device)
    return (p / clocks.exponential_(generator=generator)).argmax(1)
