"""Derivatives of a model's modules along directions, and what they bring each sample's loss."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from layerlr.estimators.replay import output_tensor, random_state, set_random_state

from .module_products import (
    Key,
    Tangent,
    differentiable,
    is_plain,
    plain_product,
    twice_backward,
)


class _Tap(torch.autograd.Function):
    """The identity, which hands ``dot = (gradient * dy)``, summed by sample, to the leaves."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, count: int, *leaves_and_dots: Tensor) -> Tensor:
        ctx.leaves = [(t.dtype, t.device) for t in leaves_and_dots[:count]]
        ctx.save_for_backward(*leaves_and_dots[count:])
        return y.clone()  # not a view: an in-place activation may follow

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        dots = [
            _by_sample(grad, dy).to(dtype=dtype, device=device)
            for dy, (dtype, device) in zip(ctx.saved_tensors, ctx.leaves, strict=True)
        ]
        return grad, None, *dots, *([None] * len(dots))


def _by_sample(grad: Tensor, dy: Tensor) -> Tensor:
    if grad.dtype in (torch.float16, torch.bfloat16):
        grad = grad.float()
    return (grad * dy).reshape(grad.shape[0], -1).sum(1)


@dataclasses.dataclass
class _Frame:
    """A call in progress: what modules called inside it have seen to, and what they could not."""

    hidden: list[Tensor]
    random: list[Tensor]
    inputs: list[tuple[Tensor, int]]
    done: set[Key] = dataclasses.field(default_factory=set)
    left: set[Key] = dataclasses.field(default_factory=set)


class ForwardProducts:
    """Hooks for one run of the model, with a leaf for each layer that gathers s over the samples.

    While a module runs, its own parameters take no gradient. Where the output still depends on one
    of them that no module around it answers for, it has been used past its module.
    """

    def __init__(
        self,
        model: nn.Module,
        owned: dict[nn.Module, dict[str, list[Tangent]]],
        tangents: Sequence[Tangent],
        layers: int,
        n: int,
    ) -> None:
        self.model, self.owned, self.n = model, owned, n
        self.keys: dict[nn.Module, dict[Key, str]] = {}
        self.names = {m: name for name, m in model.named_modules()}
        self.plain = {m for m in owned if is_plain(m)}
        self.frames: list[_Frame] = []
        self.stand_ins: set[Tensor] = set()  # parameters that another module answers for
        self.running = False
        for module in model.modules():
            keys = {
                (sub, name): f"{path}.{name}" if path else name
                for path, sub in module.named_modules()
                for name in owned.get(sub, ())
            }
            if keys:
                self.keys[module] = keys
        like = {t.layer: t.param for t in tangents}
        self.leaves = []
        for layer in range(layers):
            p = like.get(layer, torch.empty(0))
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            self.leaves.append(
                torch.zeros(max(n, 0), dtype=dtype, device=p.device, requires_grad=True)
            )

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks on every module but the model itself; all that they touch is put back."""
        params = [(t.param, t.param.requires_grad) for ts in self._tangents() for t in ts]
        handles = []
        try:
            for module in self.keys:
                if module is not self.model:
                    handles.append(
                        module.register_forward_pre_hook(self._pre, prepend=True, with_kwargs=True)
                    )
                    handles.append(module.register_forward_hook(self._post, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for p, needs in params:
                p.requires_grad_(needs)

    def _tangents(self) -> Iterator[list[Tangent]]:
        return itertools.chain.from_iterable(mine.values() for mine in self.owned.values())

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> _Frame:
        """Open a call."""
        own = [t.param for ts in self.owned.get(module, {}).values() for t in ts[:1]]
        frame = _Frame([p for p in own if p.requires_grad], [], [])
        for p in frame.hidden:
            p.requires_grad_(False)
        if module not in self.plain:  # it may have to run again
            frame.random = random_state()
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            frame.inputs = [(t, t._version) for t in tensors if not t.is_inference()]
        self.frames.append(frame)
        return frame

    def _pre(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.running:
            self.enter(module, args, kwargs)

    def _post(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self.running:
            return None
        frame = self.frames.pop()
        around = self.frames[-1]
        for p in frame.hidden:
            p.requires_grad_(True)
        around.done |= frame.done
        place = self._place(args, kwargs, output)
        if place < 0:
            around.left |= frame.left | {(module, n) for n in self.owned.get(module, ())}
            return None
        rest = self._rest(module, frame)
        if not rest:
            return None
        around.done |= rest.keys()
        leaves, spec = tree_flatten(output)
        y = leaves[place]
        dots = self._products(
            module, rest, args, kwargs, frame, y, lambda out: tree_leaves(out)[place]
        )
        if dots:
            picked = [self.leaves[layer] for layer in dots]
            leaves[place] = _Tap.apply(y, len(dots), *picked, *dots.values())
        return tree_unflatten(leaves, spec)

    def _place(self, args: Any, kwargs: Any, output: Any) -> int:
        """Which leaf of a module's output to tap, -1 where it does not fit."""
        leaves = tree_leaves(output)
        floats = [
            i for i, y in enumerate(leaves) if isinstance(y, Tensor) and y.is_floating_point()
        ]
        if len(floats) != 1 or not any(isinstance(t, Tensor) for t in tree_leaves((args, kwargs))):
            return -1
        y = leaves[floats[0]]
        return floats[0] if y.dim() and y.shape[0] == self.n else -1

    def _rest(self, module: nn.Module, frame: _Frame) -> dict[Key, str]:
        """Parameters for which this call has to answer, with their names in the module."""
        both = next((key for key in frame.left if key in frame.done), None)
        if both is not None:
            raise TypeError(
                f"module {self.names[both[0]]!r} is called both with and without the batch (of "
                f"{self.n}) in dim 0 of its output"
            )
        rest = {key: name for key, name in self.keys[module].items() if key not in frame.done}
        self.stand_ins |= {m._parameters[n] for m, n in rest if m is not module}  # type: ignore
        return rest

    def _products(
        self,
        module: nn.Module,
        rest: Mapping[Key, str],
        args: Any,
        kwargs: Any,
        frame: _Frame,
        y: Tensor,
        pick: Callable[[Any], Tensor],
    ) -> dict[int, Tensor]:
        """Derivative of the module's output along each layer's direction."""
        by_layer: dict[int, dict[str, Tensor]] = {}
        for (owner, own_name), name in rest.items():
            for t in self.owned[owner][own_name]:
                values = by_layer.setdefault(t.layer, {})
                value = t.value.detach().to(t.param)
                values[name] = values[name] + value if name in values else value
        moved = any(t._version != version for t, version in frame.inputs)
        if moved:
            raise TypeError(
                f"module {self.names[module] or '(root)'!r} changes its input in place: it cannot "
                f"run again for its parameters ({', '.join(rest.values())})"
            )
        found = {}
        self.running = True
        try:
            for layer, values in by_layer.items():
                dy = (
                    plain_product(module, values, args, kwargs, y)
                    if module in self.plain
                    else self._run_again(module, values, args, kwargs, frame, pick)
                )
                if dy is not None:
                    found[layer] = dy
        finally:
            self.running = False
        return found

    def _run_again(
        self,
        module: nn.Module,
        values: dict[str, Tensor],
        args: Any,
        kwargs: Any,
        frame: _Frame,
        pick: Callable[[Any], Tensor],
    ) -> Tensor | None:
        def again(given: dict[str, Tensor]) -> Tensor:
            """The same call, random numbers included, on copies of the buffers."""
            set_random_state(frame.random)
            buffers = {name: b.clone() for name, b in module.named_buffers()}
            inputs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
            return pick(functional_call(module, {**buffers, **given}, *inputs, tie_weights=False))

        after = random_state()
        params = {name: module.get_parameter(name).detach().requires_grad_() for name in values}
        try:
            # with gradients: torch.nn's fused inference paths have no forward mode
            with torch.enable_grad(), differentiable(module):
                try:
                    with fwd.dual_level():
                        y = again({n: fwd.make_dual(p, values[n]) for n, p in params.items()})
                        dy = fwd.unpack_dual(y).tangent
                        return dy if dy is None else dy.detach()
                except NotImplementedError:
                    return twice_backward(again(params), list(params.values()), values.values())
        except RuntimeError as error:
            raise NotImplementedError(
                f"module {self.names[module] or '(root)'!r}, which answers for the parameters "
                f"{', '.join(values)}, has no derivative in forward mode nor a second one: take "
                f"Curvature('finite-difference') ({error})"
            ) from error
        finally:
            set_random_state(after)

    def collect(
        self, frame: _Frame, args: Any, kwargs: Any, output: Tensor, residual: Tensor
    ) -> list[Tensor]:
        """s of each layer by sample, through the taps and from what is left to the model."""
        rest = self._rest(self.model, frame)
        dots = self._products(self.model, rest, args, kwargs, frame, output, output_tensor)
        sums: list[Tensor] = [leaf.detach() for leaf in self.leaves]
        direct = {t.param for ts in self._tangents() for t in ts} - self.stand_ins
        direct = {p for p in direct if p.requires_grad}
        if output.requires_grad:
            wanted = [*self.leaves, *direct]
            grads = torch.autograd.grad(output, wanted, residual, allow_unused=True)
            for p, grad in zip(direct, grads[len(sums) :], strict=True):
                if grad is not None:
                    raise ValueError(self._astray(p))
            sums = [s if g is None else g for s, g in zip(sums, grads, strict=False)]
        for layer, dy in dots.items():
            sums[layer] = sums[layer] + _by_sample(residual, dy).to(sums[layer])
        return sums

    def _astray(self, p: Tensor) -> str:
        names = [
            name for (m, own), name in self.keys[self.model].items() if m._parameters[own] is p
        ]
        return (
            f"parameter {' = '.join(names)!r} is used by the module that owns it and also past it "
            "(tied by hand): give the other use a module of its own that shares the parameter"
        )
