"""What a plan was built from of one parameter."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from layerlr import _C, memory


class Known:
    """A parameter and its state, to be recognised: users replace both, or change them in place."""

    def __init__(self, p: Tensor, state: dict[str, Any] | None) -> None:
        self._p, self._state = p, state
        self._snapshot = None if state is None else _C.Snapshot(state)
        self._forms = self._forms_now()

    def is_same(self) -> bool:
        """Whether the state holds the same objects."""
        return self._snapshot is None or self._snapshot.matches(self._state or {})

    def fits(self) -> bool:
        """Whether they are the same objects, of the same form."""
        return self.is_same() and self._forms == self._forms_now()

    def _forms_now(self) -> list[tuple[Any, ...]]:
        tensors = [x for x in (self._state or {}).values() if isinstance(x, Tensor)]
        return [
            (x.dtype, x.shape, x.device, x.layout, x.is_conj(), memory.is_writable(x))
            for x in (self._p, *tensors)
        ]
