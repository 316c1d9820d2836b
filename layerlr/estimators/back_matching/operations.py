"""A formula for each operation: what its Jacobian does to the scalars of back-matching."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .jacobian_traces import (
    Call,
    Gram,
    Grams,
    Traces,
    batch_norm,
    conv,
    linear,
    squares,
    unknown,
)

Rule = Callable[[Call], tuple[Grams, Traces]]


def _gradient(call: Call) -> Tensor:
    """J^T 1: the slopes of an elementwise function, or how often a max-pool takes each input."""
    with torch.enable_grad():
        x = call.x.detach().requires_grad_()
        y = call.again(x.clone())  # cloned: it may work in place
        return torch.autograd.grad(y, x, torch.ones_like(y))[0]


def _elementwise(call: Call) -> tuple[Grams, Traces]:
    slope = _gradient(call)
    return call.of_x(squares(slope), lambda: torch.count_nonzero(slope)), []


def _max_pool(call: Call) -> tuple[Grams, Traces]:
    return call.of_x(call.outputs(), lambda: torch.count_nonzero(_gradient(call))), []


def _each(value: Any, dims: int) -> list[Any]:
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * dims if len(values) == 1 else values


def _pool(call: Call, parts: list[Tensor], scale: float = 1.0) -> tuple[Grams, Traces]:
    """Result of an average over boxes, from the matrix of each dim."""
    copies = call.x.numel() // math.prod(p.shape[0] for p in parts)
    trace = copies * scale * scale * math.prod(float(squares(p)) for p in parts)
    return call.of_x(trace, lambda: copies * math.prod(_rank(p) for p in parts)), []


def _rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix))


def _eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64, device="cpu")


def _avg_pool(dims: int, call: Call) -> tuple[Grams, Traces]:
    kernel = _each(call.get(1, "kernel_size"), dims)
    stride = _each(call.get(2, "stride") or kernel, dims)
    padding = _each(call.get(3, "padding", 0), dims)
    ceil, inclusive = call.get(4, "ceil_mode", False), call.get(5, "count_include_pad", True)
    divisor = call.get(6, "divisor_override")
    parts = []
    for size, k, s, p in zip(call.x.shape[-dims:], kernel, stride, padding, strict=True):
        columns = _eye(size)[None, :, :, None]
        one = None if divisor is None else 1
        part = F.avg_pool2d(columns, (k, 1), (s, 1), (p, 0), ceil, inclusive, one)
        parts.append(part[0, :, :, 0])
    return _pool(call, parts, 1.0 / (divisor or 1))


def _adaptive_avg_pool(dims: int, call: Call) -> tuple[Grams, Traces]:
    sizes = call.x.shape[-dims:]
    wanted = _each(call.get(1, "output_size"), dims)
    pairs = zip(sizes, wanted, strict=True)
    return _pool(call, [F.adaptive_avg_pool1d(_eye(n)[None], k or n)[0] for n, k in pairs])


def _mean(call: Call) -> tuple[Grams, Traces]:
    out = call.outputs()
    return call.of_x(out * out / call.x.numel(), lambda: out), []


def _dropout(call: Call) -> tuple[Grams, Traces]:
    keep = 1.0 - (call.get(1, "p", 0.5) if call.get(2, "training", True) else 0.0)
    n = call.x.numel()
    return call.of_x(n / keep if keep else 0.0, lambda: n * keep), []


def _probabilities(call: Call) -> tuple[Tensor, int, int]:
    """Softmax along the dim, length of the dim, number of distributions."""
    dim = call.get(1, "dim")
    if dim is None:
        raise unknown(f"node {call.node.name!r}, a softmax without dim")
    p = call.x.double().softmax(dim)
    return p.movedim(dim, -1), p.shape[dim], p.numel() // p.shape[dim]


def _softmax(call: Call) -> tuple[Grams, Traces]:
    """J = diag(p) - pp^T."""
    p, n, count = _probabilities(call)
    squares = p.square().sum(-1)
    trace = (squares + squares.square() - 2 * p.pow(3).sum(-1)).sum()
    return call.of_x(trace, lambda: count * (n - 1)), []


def _log_softmax(call: Call) -> tuple[Grams, Traces]:
    """J = I - 1p^T."""
    p, n, count = _probabilities(call)
    return call.of_x(count * (n - 2) + n * p.square().sum(), lambda: count * (n - 1)), []


def _same(call: Call) -> tuple[Grams, Traces]:
    n = call.x.numel()
    return call.of_x(n, lambda: n), []


def pair(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Both operands."""
    first, second, *_ = (*args, *(kwargs[k] for k in ("input", "other") if k in kwargs))
    return first, second


def _plus(call: Call, sign: float = 1.0) -> tuple[Grams, Traces]:
    nodes, values = pair(call.node.args, call.node.kwargs), pair(call.args, call.kwargs)
    shape = torch.broadcast_shapes(*(v.shape for v in values if isinstance(v, Tensor)))
    second = sign * call.kwargs.get("alpha", 1)
    if nodes[0] is nodes[1]:
        return call.of_x((1 + second) ** 2 * math.prod(shape), call.x.numel), []
    return [
        (n, Gram(factor**2 * math.prod(shape), v.numel(), v.numel))
        for n, v, factor in zip(nodes, values, (1.0, second), strict=True)
        if isinstance(n, fx.Node) and isinstance(v, Tensor)
    ], []


def _minus(call: Call) -> tuple[Grams, Traces]:
    return _plus(call, -1.0)


def times(call: Call, power: int = 2) -> tuple[Grams, Traces]:
    """A product with what depends on no parameter."""
    nodes, values = pair(call.node.args, call.node.kwargs), pair(call.args, call.kwargs)
    i = 0 if nodes[0] in call.live else 1
    x, other = values[i], values[1 - i]
    if not isinstance(other, Tensor):
        return [(nodes[i], Gram(float(other) ** power * x.numel(), x.numel(), x.numel))], []
    shape = torch.broadcast_shapes(x.shape, other.shape)
    diagonal = other.double().pow(power).expand(shape).sum_to_size(x.shape)
    gram = Gram(diagonal.sum(), x.numel(), lambda: torch.count_nonzero(diagonal))
    return [(nodes[i], gram)], []


def over(call: Call) -> tuple[Grams, Traces]:
    """A quotient by such a value."""
    return times(call, -2)


def _cat(call: Call) -> tuple[Grams, Traces]:
    nodes = call.node.args[0] if call.node.args else call.node.kwargs["tensors"]
    values = call.args[0] if call.args else call.kwargs["tensors"]
    pairs = zip(nodes, values, strict=True)  # type: ignore[arg-type]
    return [(n, Gram(v.numel(), v.numel(), v.numel)) for n, v in pairs], []


def _named(space: Any, names: str) -> list[Any]:
    return [getattr(space, name) for name in names.split()]


# keyed by type of module, function, or name of a method of Tensor
RULES: dict[Any, Rule] = {nn.Linear: linear}
for _rule, _keys in (
    (conv, [nn.Conv1d, nn.Conv2d]),
    (batch_norm, [nn.BatchNorm1d, nn.BatchNorm2d]),
    (
        _elementwise,
        [
            *_named(
                nn, "ReLU ReLU6 LeakyReLU ELU SELU CELU GELU SiLU Mish Tanh Sigmoid LogSigmoid"
            ),
            *_named(nn, "Softplus Hardtanh Hardsigmoid Hardswish"),
            *_named(F, "relu relu6 leaky_relu leaky_relu_ elu elu_ selu celu gelu silu mish"),
            *_named(F, "logsigmoid softplus hardtanh hardtanh_ hardsigmoid hardswish"),
            *_named(torch, "relu relu_ tanh tanh_ sigmoid sigmoid_"),
            *("relu", "relu_", "tanh", "tanh_", "sigmoid", "sigmoid_"),
        ],
    ),
    (
        _max_pool,
        [
            *_named(nn, "MaxPool1d MaxPool2d AdaptiveMaxPool1d AdaptiveMaxPool2d"),
            *_named(F, "max_pool1d max_pool2d adaptive_max_pool1d adaptive_max_pool2d"),
        ],
    ),
    (functools.partial(_avg_pool, 1), [nn.AvgPool1d, F.avg_pool1d]),
    (functools.partial(_avg_pool, 2), [nn.AvgPool2d, F.avg_pool2d]),
    (functools.partial(_adaptive_avg_pool, 1), [nn.AdaptiveAvgPool1d, F.adaptive_avg_pool1d]),
    (functools.partial(_adaptive_avg_pool, 2), [nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d]),
    (_mean, [torch.mean, "mean"]),
    (_dropout, [*_named(nn, "Dropout Dropout1d Dropout2d"), F.dropout, F.dropout1d, F.dropout2d]),
    (_softmax, [nn.Softmax, F.softmax, torch.softmax, "softmax"]),
    (_log_softmax, [nn.LogSoftmax, F.log_softmax, torch.log_softmax, "log_softmax"]),
    (
        _same,
        [
            *_named(nn, "Identity Flatten Unflatten"),
            *_named(torch, "flatten reshape squeeze unsqueeze permute transpose clone neg"),
            *"flatten view reshape squeeze unsqueeze permute transpose contiguous clone".split(),
            *("neg", "to", "float", "double", operator.neg),
        ],
    ),
    (_plus, [operator.add, operator.iadd, torch.add, "add", "add_"]),
    (_minus, [operator.sub, operator.isub, torch.sub, "sub", "sub_"]),
    (times, [operator.mul, operator.imul, torch.mul, "mul", "mul_"]),
    (over, [operator.truediv, operator.itruediv, torch.div, "div", "div_"]),
    (_cat, [torch.cat, torch.stack]),
):
    RULES |= dict.fromkeys(_keys, _rule)
