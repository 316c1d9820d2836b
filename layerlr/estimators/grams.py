"""Traces of Gram matrices of Jacobians: a formula for each kind of operation."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

Number = float | Tensor


def unknown(what: str) -> ValueError:
    """The refusal of an operation."""
    return ValueError(
        f'estimator="structural" does not know {what}: use estimator="probe", which fits any model'
    )


class Gram(NamedTuple):
    """Of a Jacobian of the whole batch: tr(J^T J), its size, and its rank where that is wanted."""

    trace: Number
    size: int
    rank: Callable[[], Number]

    def scalar(self, by_rank: bool) -> Number:
        n = self.rank() if by_rank else self.size
        if isinstance(n, Tensor):
            return self.trace / n.clamp(min=1).double()
        return self.trace / n if n else 0.0


Grams = list[tuple[fx.Node, Gram]]
Traces = list[tuple[Tensor, Number]]


class Call:
    """One node with the values of its arguments."""

    def __init__(
        self,
        node: fx.Node,
        module: nn.Module | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        live: set[fx.Node],
    ) -> None:
        self.node, self.module, self.args, self.kwargs, self.live = node, module, args, kwargs, live

    @property
    def x(self) -> Tensor:
        """First argument."""
        return self.args[0] if self.args else self.kwargs["input"]

    def get(self, place: int, name: str, default: Any = None) -> Any:
        """An option, of the module or of the function."""
        if self.module is not None:
            return getattr(self.module, name, default)
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def again(self, x: Tensor) -> Tensor:
        """Value for another first argument."""
        args, kwargs = self.args[1:], {k: v for k, v in self.kwargs.items() if k != "input"}
        if self.module is not None:
            y = self.module.forward(x, *args, **kwargs)  # not called: hooks are for the real pass
        elif self.node.op == "call_method":
            y = getattr(x, str(self.node.target))(*args, **kwargs)
        else:
            y = self.node.target(x, *args, **kwargs)  # type: ignore[operator]
        if not isinstance(y, Tensor):
            raise unknown(f"node {self.node.name!r}, whose value is not one tensor")
        return y

    def outputs(self) -> int:
        """Number of outputs."""
        return self.again(torch.empty_like(self.x, device="meta")).numel()

    def of_x(self, trace: Number, rank: Callable[[], Number]) -> Grams:
        """Result where only the first argument is differentiated."""
        node = self.node.args[0] if self.node.args else self.node.kwargs["input"]
        return [(node, Gram(trace, self.x.numel(), rank))]  # type: ignore[list-item]


Rule = Callable[[Call], tuple[Grams, Traces]]


def _squares(x: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    return torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64).square()


def _linear(call: Call) -> tuple[Grams, Traces]:
    layer, x = call.module, call.x
    assert isinstance(layer, nn.Linear)
    if x.dim() < 2:
        raise unknown(f"module {call.node.target!r} (Linear) on an input without a batch")
    n_out, n_in = layer.weight.shape
    rows = x.numel() // n_in
    traces: Traces = [(layer.weight, n_out * _squares(x))]
    if layer.bias is not None:
        traces.append((layer.bias, float(rows * n_out)))
    return call.of_x(rows * _squares(layer.weight), lambda: rows * min(n_in, n_out)), traces


def _taps(
    size: int, kernel: int, stride: int, dilation: int, padding: int | str, circular: bool
) -> tuple[Tensor, Tensor, int]:
    """How often each tap reads an input, how often each input is read, number of outputs."""
    span = dilation * (kernel - 1)
    before = span // 2 if padding == "same" else 0 if padding == "valid" else int(padding)
    after = span - before if padding == "same" else before
    outputs = (size + before + after - span - 1) // stride + 1
    place = torch.arange(outputs, device="cpu")[:, None] * stride - before
    place = place + torch.arange(kernel, device="cpu") * dilation
    if circular:
        place = place % size
    inside = (place >= 0) & (place < size)
    return inside.sum(0), torch.bincount(place[inside], minlength=size), outputs


def _wrapped(weight: Tensor, dim: int, dilation: int, size: int) -> Tensor:
    """A kernel longer than its circular input: taps that fall on the same input add up."""
    place = torch.arange(weight.shape[dim], device=weight.device) * dilation % size
    full = list(weight.shape)
    full[dim] = size
    return weight.new_zeros(full).index_add(dim, place, weight)


def _dot(x: Tensor, vectors: list[Tensor]) -> Tensor:
    for v in reversed(vectors):
        x = x @ v.to(x.device, x.dtype, non_blocking=True)
    return x


def _conv(call: Call) -> tuple[Grams, Traces]:
    layer, x = call.module, call.x
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    weight = layer.weight
    if x.dim() != weight.dim():
        raise unknown(
            f"module {call.node.target!r} ({type(layer).__name__}) on an input without a batch"
        )
    circular = layer.padding_mode == "circular"
    kernel = weight
    reads, visits, positions = [], [], 1
    for i, size in enumerate(x.shape[2:]):
        k, dilation = layer.kernel_size[i], layer.dilation[i]
        padding = layer.padding if isinstance(layer.padding, str) else layer.padding[i]
        read, visit, outputs = _taps(size, k, layer.stride[i], dilation, padding, circular)
        if circular and dilation * (k - 1) >= size:
            kernel = _wrapped(kernel, 2 + i, dilation, size)
            read = torch.full((size,), outputs, device="cpu")
        reads.append(read)
        visits.append(visit)
        positions *= outputs
    samples, c_in, c_out = x.shape[0], layer.in_channels, layer.out_channels
    traces: Traces = [(weight, c_out / layer.groups * _dot(_squares(x, (0, 1)), visits))]
    if layer.bias is not None:
        traces.append((layer.bias, float(samples * positions * c_out)))

    def rank() -> float:
        touched = math.prod(int((v > 0).sum()) for v in visits)
        return samples * min(c_in * touched, c_out * positions)

    return call.of_x(samples * _dot(_squares(kernel, (0, 1)), reads), rank), traces


def _batch_norm(call: Call) -> tuple[Grams, Traces]:
    layer, x = call.module, call.x
    assert isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))
    channels = x.shape[1]
    m = x.numel() // channels
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
    var, mean = var.double(), mean.double()
    if layer.training or layer.running_mean is None or layer.running_var is None:
        # J = gamma/sigma * (I - 11^T/m - xx^T/m) for the normalised x, of which |x|^2 = m*r
        scale = 1.0 / (var + layer.eps)
        r = var * scale
        trace, norm, free = (m - 1) - 2 * r + r * r, m * r, max(m - 2, 1)
    else:
        scale = 1.0 / (layer.running_var.double() + layer.eps)
        shift = mean - layer.running_mean.double()
        trace, norm, free = torch.full_like(scale, m), m * scale * (var + shift * shift), m
    traces: Traces = []
    if layer.affine:
        traces = [(layer.weight, norm.sum()), (layer.bias, float(m * channels))]
        scale = scale * layer.weight.double().square()
    return call.of_x((scale * trace).sum(), lambda: channels * free), traces


def _gradient(call: Call) -> Tensor:
    """J^T 1: the slopes of an elementwise function, or how often a max-pool takes each input."""
    with torch.enable_grad():
        x = call.x.detach().requires_grad_()
        y = call.again(x.clone())  # cloned: it may work in place
        return torch.autograd.grad(y, x, torch.ones_like(y))[0]


def _elementwise(call: Call) -> tuple[Grams, Traces]:
    slope = _gradient(call)
    return call.of_x(_squares(slope), lambda: torch.count_nonzero(slope)), []


def _max_pool(call: Call) -> tuple[Grams, Traces]:
    return call.of_x(call.outputs(), lambda: torch.count_nonzero(_gradient(call))), []


def _each(value: Any, dims: int) -> list[Any]:
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * dims if len(values) == 1 else values


def _pool(call: Call, parts: list[Tensor], scale: float = 1.0) -> tuple[Grams, Traces]:
    """Result of an average over boxes, from the matrix of each dim."""
    copies = call.x.numel() // math.prod(p.shape[0] for p in parts)
    trace = copies * scale * scale * math.prod(float(_squares(p)) for p in parts)
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
RULES: dict[Any, Rule] = {nn.Linear: _linear}
for _rule, _keys in (
    (_conv, [nn.Conv1d, nn.Conv2d]),
    (_batch_norm, [nn.BatchNorm1d, nn.BatchNorm2d]),
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
