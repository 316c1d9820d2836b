"""Products with the Hessian, by a backward pass through the gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from layerlr.backends.config import GRAD_FACTOR
from layerlr.estimators.layers import LayerSet
from layerlr.layers import is_kernel

#: ``u^T H v`` of each layer, of one list of tensors v
Product: TypeAlias = Callable[[list[Tensor]], Tensor]


def product(layers: LayerSet) -> Product:
    """``v -> u^T H v`` of each layer, by a backward pass through the gradients."""
    params = layers.params()
    with_graph = [p.grad is not None and p.grad.requires_grad for p in params]
    outputs = [p.grad for p, graph in zip(params, with_graph, strict=True) if graph]
    if not outputs:
        raise RuntimeError(
            "rule 'curvature' found gradients without their graph: call "
            "loss.backward(create_graph=optimizer.is_second_order), with use_reentrant=False in "
            "torch.utils.checkpoint, or take Curvature('fisher') or Curvature('finite-difference')"
        )
    for p, name, graph in zip(params, layers.names(), with_graph, strict=True):
        if not graph and is_kernel(p) and p.grad is not None and p.grad.any():
            raise RuntimeError(
                f"rule 'curvature' found a gradient of {name!r} without its graph, and others with "
                "theirs: under torch.utils.checkpoint pass use_reentrant=False. Where the loss is "
                "linear in it, leave it out by adapt=, or take Curvature('fisher')"
            )
    sign = ascent(layers)

    def along(v: list[Tensor]) -> Tensor:
        # where a gradient has no graph the loss is linear, and its row of H is 0
        given = [x for x, graph in zip(v, with_graph, strict=True) if graph]
        given = [x.to(g.dtype) for x, g in zip(given, outputs, strict=True)]  # type: ignore
        with torch.enable_grad(), _second_derivatives():
            h = torch.autograd.grad(
                outputs,  # type: ignore[arg-type]
                params,
                given,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        return sign * layers.dot(layers.steps, h)

    return along


@contextlib.contextmanager
def _second_derivatives() -> Iterator[None]:
    """Say what to do where torch has none of an operation."""
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        if "is not implemented" not in str(error):
            raise
        raise RuntimeError(
            f"rule 'curvature' differentiates twice, and torch cannot: {error}. Fused attention: "
            "run forward and backward within torch.nn.attention.sdpa_kernel("
            "torch.nn.attention.SDPBackend.MATH), which has second derivatives. Anything else: "
            "take Curvature('fisher') or Curvature('finite-difference')"
        ) from error


def matrix(layers: LayerSet) -> Tensor:
    """``u_l^T H u_m`` of all layers, by one product for each."""
    along = product(layers)
    rows = len(layers)
    columns = []
    for layer in range(rows):
        only = torch.zeros(rows, dtype=torch.float64, device=layers.device)
        only[layer] = 1.0
        columns.append(along(layers.scaled(only, layers.steps)))
    return torch.stack(columns, 1)


def ascent(layers: LayerSet) -> Tensor:
    """Factor on each layer's gradients, whose sign says whether the loss is maximised."""
    return layers.of_groups(lambda config: float(config.get(GRAD_FACTOR)))
