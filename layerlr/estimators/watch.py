"""The model as its optimizer sees it: the batch that went through it last, to run once more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class _Hook:
    """A forward pre-hook of one model only: a copy of the model, or one read back, has none."""

    def __init__(self, watch: ModelWatch | None) -> None:
        self.watch = watch

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.watch is not None and torch.is_grad_enabled():
            self.watch.see(args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None,)


class ModelWatch:
    """Remembers the arguments and the random state of a model's last forward pass.

    Passes without gradients (evaluation) are not remembered. The arguments are held by reference:
    a batch that is overwritten in place is seen as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._seen: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._rng: list[Tensor] = []
        self._replaying = False
        self._made: dict[Any, Any] = {}
        self._handle = model.register_forward_pre_hook(_Hook(self), with_kwargs=True)

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember a forward pass that is about to begin."""
        if not self._replaying:
            self._seen, self._rng = (args, kwargs), random_state()

    def forget(self) -> None:
        """Let go of the batch."""
        self._seen, self._rng = None, []

    def close(self) -> None:
        """Remove the hook."""
        self._handle.remove()
        self.forget()

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
                "the attached model has not run since the last step: call the model that was "
                "given to optimizer.attach(model), with gradients enabled, before optimizer.step()"
            )
        with self.unchanged(self._rng):
            yield self._seen

    @contextlib.contextmanager
    def unchanged(self, rng: list[Tensor]) -> Iterator[None]:
        """Run the model once more from a random state; buffers and random states are put back."""
        buffers = [(b, b.detach().clone()) for b in self.model.buffers()]
        now = random_state()
        set_random_state(rng)
        self._replaying = True
        try:
            yield
        finally:
            self._replaying = False
            set_random_state(now)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)

    def once(self, make: Callable[..., T], **options: Any) -> T:
        """What ``make(model, **options)`` gives, made at the first call."""
        key = make, tuple(options.items())
        if key not in self._made:
            self._made[key] = make(self.model, **options)
        made: T = self._made[key]
        return made


def random_state() -> list[Tensor]:
    """Of the host, then of each GPU; reading a GPU's does not wait for it."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if cuda else ())]


def set_random_state(state: list[Tensor]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])
