"""The derivative of one module's output along a direction of its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

Key = tuple[nn.Module, str]  # the module that owns a parameter, and the parameter's name there

#: Linear in weight and bias together, the bias added along the last dims, or along dim 1.
LAST = (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag)
CHANNELS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm),
)


class Tangent(NamedTuple):
    """Direction of one parameter in one layer: of its shape, zero outside the layer's part."""

    param: Tensor
    value: Tensor
    layer: int


def owned_by(
    model: nn.Module, tangents: Sequence[Tangent]
) -> dict[nn.Module, dict[str, list[Tangent]]]:
    """Tangents by the modules that own their parameters (tied ones have several)."""
    of: dict[Tensor, list[Tangent]] = {}
    for t in tangents:
        if t.value.shape != t.param.shape:
            raise ValueError(
                f"a tangent of layer {t.layer} has shape {tuple(t.value.shape)}, its parameter "
                f"{tuple(t.param.shape)}"
            )
        of.setdefault(t.param, []).append(t)
    owned = {}
    for module in model.modules():
        mine = {n: of[p] for n, p in module._parameters.items() if p is not None and p in of}
        if mine:
            owned[module] = mine
    found = {p for m, mine in owned.items() for p in (m._parameters[n] for n in mine)}
    for t in tangents:
        if t.param not in found:
            raise ValueError(
                f"a tangent of layer {t.layer}, of shape {tuple(t.param.shape)}, belongs to no "
                "parameter of the model"
            )
    return owned


def is_plain(module: nn.Module) -> bool:
    """Whether a module is linear in its weight and bias together, and nothing else happens."""
    if type(module) not in (*LAST, *CHANNELS) or getattr(module, "max_norm", None) is not None:
        return False
    hooks = bool(module._forward_hooks) or bool(module._forward_pre_hooks)
    return module._parameters.keys() <= {"weight", "bias"} and not hooks


def plain_product(
    module: nn.Module,
    values: dict[str, Tensor],
    args: Any,
    kwargs: Any,
    y: Tensor,
) -> Tensor:
    """The module itself, with the direction in the place of its parameters."""
    if values.keys() == {"bias"}:
        bias = values["bias"].to(y.dtype)
        if type(module) in CHANNELS:
            bias = bias.reshape(-1, *[1] * (y.dim() - 2))
        return bias.expand_as(y)
    given = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    given |= values | buffers
    with torch.no_grad():
        return functional_call(module, given, args, kwargs, tie_weights=False)


def twice_backward(y: Tensor, params: Sequence[Tensor], values: Iterable[Tensor]) -> Tensor | None:
    """``J d`` as the derivative of ``(J^T u).d`` in u: the double backward of one module."""
    u = torch.zeros_like(y, requires_grad=True)
    back = torch.autograd.grad(y, params, u, create_graph=True, allow_unused=True)
    used = [(g, v) for g, v in zip(back, values, strict=True) if g is not None]
    if not used:
        return None
    (dy,) = torch.autograd.grad([g for g, _ in used], u, [v for _, v in used])
    return dy


@contextlib.contextmanager
def differentiable(module: nn.Module) -> Iterator[None]:
    """Kernels that PyTorch can differentiate in forward mode, or at least twice."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(m, nn.RNNBase) for m in module.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def eager(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Without compiled code, which ignores hooks."""
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl for m in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()
