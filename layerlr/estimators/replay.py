"""The model as its optimizer sees it: the batch that went through it last, to run once more."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class _Hook:
    """A forward pre-hook of one model only: a copy of the model, or one read back, has none."""

    def __init__(self, replay: ModelReplay | None) -> None:
        # weak: when the optimizer is gone, so is the batch
        self.replay = None if replay is None else weakref.ref(replay)

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        replay = None if self.replay is None else self.replay()
        if replay is not None and torch.is_grad_enabled():
            replay.see(args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None,)


class ModelReplay:
    """Remembers the arguments, the random state and the autocast of a model's last forward pass.

    Passes without gradients (evaluation) are not remembered. The arguments are held by reference:
    a batch that is overwritten in place is seen as it is now. The hook goes with this object.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        self._seen: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._rng: list[Tensor] = []
        self._autocast: list[tuple[str, torch.dtype]] = []
        self._replaying = False
        self._made: dict[Any, Any] = {}
        handle = model.register_forward_pre_hook(_Hook(self), with_kwargs=True)
        self._remove = weakref.finalize(self, handle.remove)

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember a forward pass that is about to begin."""
        if not self._replaying:
            self._seen, self._rng = (args, kwargs), random_state()
            self._autocast = [
                (device, torch.get_autocast_dtype(device))
                for device in ("cpu", "cuda")
                if torch.is_autocast_enabled(device)
            ]

    def close(self) -> None:
        """Remove the hook and let go of the batch."""
        self._remove()
        self._seen, self._rng = None, []

    @contextlib.contextmanager
    def replay(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments of the last forward pass, to be run again with its random numbers (dropout).

        Buffers (running statistics) and random states are put back afterwards.

        Raises
        ------
        RuntimeError
            Where no forward pass with gradients has been seen.
        """
        if self._seen is None:
            raise RuntimeError(
                "the attached model has not run yet: call the model that was given to "
                "optimizer.attach(model), with gradients enabled, before optimizer.step()"
            )
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.unchanged(self._rng))
            for device, dtype in self._autocast:
                stack.enter_context(torch.autocast(device, dtype))
            yield self._seen

    @contextlib.contextmanager
    def unchanged(self, rng: list[Tensor]) -> Iterator[None]:
        """Run the model once more from a random state; buffers and random states are put back."""
        owned = [(m._buffers, dict(m._buffers)) for m in self.model.modules()]
        values = [(b, b.detach().clone()) for b in self.model.buffers()]
        now = random_state()
        set_random_state(rng)
        self._replaying = True
        try:
            yield
        finally:
            self._replaying = False
            set_random_state(now)
            for buffers, before in owned:  # a forward pass may assign other tensors
                buffers.clear()
                buffers.update(before)
            with torch.no_grad():
                for buffer, value in values:
                    buffer.data.copy_(value)  # a graph may hold it: no new version

    def once(self, make: Callable[..., T], **options: Any) -> T:
        """What ``make(model, **options)`` gives, made at the first call."""
        key = make, tuple(options.items())
        if key not in self._made:
            self._made[key] = make(self.model, **options)
        made: T = self._made[key]
        return made


def output_tensor(output: object) -> Tensor:
    """The floating-point tensor that a model returned, alone, as ``logits``, or in a tuple.

    In a tuple it is the one with a batch dimension, as in ``(logits, loss)``.

    Raises
    ------
    TypeError
        Where there is none, or more than one, or it has no batch dimension.
    """
    found = output
    if not isinstance(output, Tensor):
        found = output.get("logits") if isinstance(output, Mapping) else None
        found = getattr(output, "logits", None) if found is None else found
    if found is None and isinstance(output, tuple):
        candidates = [x for x in output if isinstance(x, Tensor) and x.dim()]
        found = candidates[0] if len(candidates) == 1 else None
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the model returned {type(output).__name__}, wanted one tensor, an object or mapping "
            "with a tensor 'logits', or a tuple in which one tensor has a batch dimension"
        )
    if not found.is_floating_point() or not found.dim():
        raise TypeError(
            f"the model's output is {found.dtype} of shape {tuple(found.shape)}, wanted floating "
            "point with the batch in dim 0"
        )
    return found


def refuse_reentrant(output: Tensor) -> None:
    """Refuse an output whose graph lacks what reentrant checkpoints compute in the backward pass.

    Raises
    ------
    RuntimeError
        Naming the remedy.
    """
    seen, nodes = set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(
                "the model's output has no graph of what torch.utils.checkpoint computes with "
                "use_reentrant=True: pass use_reentrant=False there"
            )
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]


def random_state() -> list[Tensor]:
    """Of the host, then of each GPU; reading a GPU's does not wait for it."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if cuda else ())]


def set_random_state(state: list[Tensor]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])
