"""Back-matching by probe: one backward pass from random signs at the model's output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerlr.estimators.replay import output_tensor, refuse_reentrant


def probe(
    output: object, params: Sequence[Tensor], generator: torch.Generator | None = None
) -> list[Tensor | None]:
    """Gradients of random signs at a model's output: the parameters' share of its Jacobian.

    With J_l the Jacobian of all N samples' outputs with respect to layer l and v independent
    random signs, one for each element of the output::

        p_l = J_l^T v;  E|p_l|^2 = sum_ij E[v_i v_j] (J_l J_l^T)_ij = trace(J_l^T J_l)

    so ``|p_l|^2/(N*dim_l)`` is an unbiased estimate of the mean diagonal entry of the layer's
    Gauss-Newton block, per sample and with the identity for the output's Hessian. No sample needs
    to be independent of another: BatchNorm may couple them.

    Parameters
    ----------
    output
        What the model returned, as `output_tensor` takes it, with its graph, which is freed.
    params
        Where to read the gradients, in any number of layers.
    generator
        Of the signs, on the output's device; None takes the default one.

    Returns
    -------
    list
        p for each parameter, in its shape; None where the output does not depend on it, or it
        takes no gradient. ``.grad`` is left alone.

    Raises
    ------
    TypeError
        For an output that is not one floating-point tensor.
    RuntimeError
        Where the output has no graph, or not all of it.

    Notes
    -----
    One backward pass.

    References
    ----------
    Zhang, Chen, Liu: Train feedforward neural network with layer-wise adaptive rate via
    approximating back-matching propagation, arXiv:1802.09750, divides each layer's rate by a
    scalar that the network's structure gives. The estimate by random signs is ours, after
    Hutchinson's of a trace; it sums over the whole chain what the scalars approximate by factors.
    """
    y = output_tensor(output)
    if not y.requires_grad:
        raise RuntimeError("the model's output has no graph: run the model with gradients enabled")
    refuse_reentrant(y)
    wanted = [p for p in params if p.requires_grad]
    grads = iter(torch.autograd.grad(y, wanted, _signs(y, generator), allow_unused=True))
    return [next(grads) if p.requires_grad else None for p in params]


def _signs(y: Tensor, generator: torch.Generator | None) -> Tensor:
    coins = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    return coins.bernoulli_(0.5, generator=generator).mul_(2.0).sub_(1.0)
