"""Traces of Gram matrices of Jacobians, and those of the modules that own parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
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


def squares(x: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """Sums of squares, in float64."""
    return torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64).square()


def linear(call: Call) -> tuple[Grams, Traces]:
    """A matrix product."""
    layer, x = call.module, call.x
    assert isinstance(layer, nn.Linear)
    if x.dim() < 2:
        raise unknown(f"module {call.node.target!r} (Linear) on an input without a batch")
    n_out, n_in = layer.weight.shape
    rows = x.numel() // n_in
    traces: Traces = [(layer.weight, n_out * squares(x))]
    if layer.bias is not None:
        traces.append((layer.bias, float(rows * n_out)))
    return call.of_x(rows * squares(layer.weight), lambda: rows * min(n_in, n_out)), traces


def _reads(
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


def conv(call: Call) -> tuple[Grams, Traces]:
    """A convolution."""
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
        read, visit, outputs = _reads(size, k, layer.stride[i], dilation, padding, circular)
        if circular and dilation * (k - 1) >= size:
            kernel = _wrapped(kernel, 2 + i, dilation, size)
            read = torch.full((size,), outputs, device="cpu")
        reads.append(read)
        visits.append(visit)
        positions *= outputs
    samples, c_in, c_out = x.shape[0], layer.in_channels, layer.out_channels
    traces: Traces = [(weight, c_out / layer.groups * _dot(squares(x, (0, 1)), visits))]
    if layer.bias is not None:
        traces.append((layer.bias, float(samples * positions * c_out)))

    def rank() -> float:
        touched = math.prod(int((v > 0).sum()) for v in visits)
        return samples * min(c_in * touched, c_out * positions)

    return call.of_x(samples * _dot(squares(kernel, (0, 1)), reads), rank), traces


def batch_norm(call: Call) -> tuple[Grams, Traces]:
    """Batch normalization."""
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
