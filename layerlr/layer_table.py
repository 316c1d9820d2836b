"""The layers of a group's parameters, as a step goes over them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import devices


class Span(NamedTuple):
    """Rows ``begin:end`` of dim 0 of one tensor, all in one layer (a 0-dim tensor is one row)."""

    tensor: int
    begin: int
    end: int
    layer: int


@dataclasses.dataclass
class LayerTable:
    """The layers of one param group on one device, the table every backend works from.

    Attributes
    ----------
    params, names
        The parameters that take steps, in group order.
    spans
        Their parts, in order; each part belongs to one layer.
    layers
        Name of each layer.
    ruled
        Whether the rule governs the layer. A parameter outside every layer has a row of its own
        here with ``ruled`` false: it takes the plain step, and its non-finite gradient is its own.
    lr_scale
        Factor on lr for each layer: the group's ``lr_factor``, and the ratio of ``plain_lr`` to lr
        where the rule does not govern.
    start_radius
        The norm at which a layer that starts at zero comes under a rule with a radius; the number
        of its weights under a rule that averages; 0 under others.
    places
        The layer's place in a list of ``lr_factor``; None outside every layer.
    again
        Whether tables before it have the same parameters, listed twice in their group.
    """

    params: list[Tensor]
    names: list[str]
    spans: list[Span]
    layers: list[str]
    ruled: list[bool]
    lr_scale: list[float]
    start_radius: list[float]
    places: list[int | None] = dataclasses.field(default_factory=list)
    again: bool = False

    @property
    def device(self) -> torch.device:
        """Device of every parameter of the table."""
        return self.params[0].device

    @functools.cached_property
    def parts(self) -> list[list[Span]]:
        """The spans of each tensor, in row order."""
        parts: list[list[Span]] = [[] for _ in self.params]
        for span in self.spans:
            parts[span.tensor].append(span)
        return parts

    def part(
        self, layers: Sequence[int], params: list[Tensor], names: list[str], spans: list[Span]
    ) -> LayerTable:
        """A table of some of the layers, over other tensors."""
        return LayerTable(
            params,
            names,
            spans,
            [self.layers[k] for k in layers],
            [self.ruled[k] for k in layers],
            [self.lr_scale[k] for k in layers],
            [self.start_radius[k] for k in layers],
        )

    def sum(self, tensor: int, x: Tensor, total: Tensor) -> None:
        """Add the sum of each part of ``x``, which has the tensor's shape, to its layer."""
        for span in self.parts[tensor]:
            part = x if len(self.parts[tensor]) == 1 else x[span.begin : span.end]
            total[span.layer] += part.sum()

    def spread(self, tensor: int, values: Tensor, like: Tensor) -> Tensor:
        """Each element's entry of a per-layer tensor, rounded once to the dtype of ``like``."""
        if values.dtype != torch.bool:
            values = values.to(like.dtype)
        spans = self.parts[tensor]
        if len(spans) == 1:
            return values[spans[0].layer]
        of_rows = values[self._layers_of_rows(tensor)]
        return of_rows.view(-1, *[1] * (like.dim() - 1))

    def _layers_of_rows(self, tensor: int) -> Tensor:
        """An index on the device, made once: a list would be copied there and waited for."""
        if tensor not in self._indices:
            listed = [s.layer for s in self.parts[tensor] for _ in range(s.begin, s.end)]
            self._indices[tensor] = devices.numbers(listed, torch.long, self.device)
        return self._indices[tensor]

    @functools.cached_property
    def _indices(self) -> dict[int, Tensor]:
        return {}

    def leaders(self, states: Sequence[object | None]) -> list[tuple[int, int, int]]:
        """(layer, tensor, place among its parts) of each layer's first part with a state.

        The state of that parameter holds the layer's memory.
        """
        seen: dict[int, tuple[int, int]] = {}
        for i, spans in enumerate(self.parts):
            for k, span in enumerate(spans if states[i] is not None else ()):
                seen.setdefault(span.layer, (i, k))
        return [(layer, i, k) for layer, (i, k) in sorted(seen.items()) if self.ruled[layer]]


def rows(p: Tensor) -> int:
    """Length of dim 0, counting a 0-dim tensor as one row."""
    return p.shape[0] if p.dim() else 1


def row_length(p: Tensor) -> int:
    """Numbers in a row of dim 0; a complex number is two."""
    return p.numel() * (1 + p.is_complex()) // max(rows(p), 1)
