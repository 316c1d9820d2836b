"""The Triton engine: one cached plan, a few small launches a step."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from layerlr import _C, codes, devices
from layerlr.layer_table import Span, row_length

from . import native
from .base import PlanSpec
from .config import UNREAD, StepConfig


def _interpreted() -> bool:
    """Whether Triton interprets the kernels, on tensors in memory of the host."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class TritonBackend:
    """float32, float64, bfloat16, float16 and complex parameters in memory of a GPU."""

    name = "triton"

    def missing(self, device: torch.device) -> str | None:
        """Why a device has no such engine."""
        if device.type != ("cpu" if _interpreted() else "cuda"):
            return f"does not support parameters on {device}"
        if importlib.util.find_spec("triton") is None:
            return "needs Triton: pip install triton"
        return devices.absent(device)

    def unsupported(self, spec: PlanSpec) -> str | None:
        """Why a case must go elsewhere."""
        device = spec.table.device
        return (
            self.missing(device)
            or native.unsupported(spec)
            or native.counts_elsewhere(spec, device)
        )

    def plan(self, spec: PlanSpec) -> TritonPlan:
        """Plan for a supported case."""
        return TritonPlan(spec)


class TritonPlan:
    """Tables in device memory, of which a step writes again what changed."""

    def __init__(self, spec: PlanSpec) -> None:
        kernels: Any = importlib.import_module("layerlr.kernels")  # which imports Triton

        self.spec, self._kernels = spec, kernels
        self._native = _C.BoundPlan(native.bound(spec))
        self._blocks = kernels.INTERPRETED if _interpreted() else kernels.Blocks()
        device = spec.table.device
        host = _tables(spec, self._blocks.elements, self._blocks.rows)
        tables = {name: table.to(device) for name, table in host.items()}
        self._tables = kernels.Tables(**tables, stats=spec.stats)
        self._known: dict[str, Tensor] = {}  # what was written last into the tables that change
        self._captured: dict[str, list[Tensor]] = {}  # of those, what graphs read
        kinds = _by_kind(spec, host["spans"], host["tiles"], self._blocks.tiles)
        self._tiles = {kernels.Stored(*kind): of.to(device) for kind, of in kinds.items()}
        self._bind()

    def _bind(self) -> None:
        """Make the launches, which hold the tables."""
        self._launches = {measured: self._plan(measured) for measured in (False, True)}

    def _plan(self, measured: bool) -> dict[str, list[Any]]:
        """The launches of each method: kernel and grid, arguments, constants."""
        direction, rule = self.spec.direction.name, self.spec.rule
        name = "plain" if rule is None else rule.kernel
        launches = self._kernels.launches(
            direction, name, measured, list(self._tiles), self._blocks, self.spec.precision
        )
        return {method: [self._bound(x) for x in of] for method, of in launches._asdict().items()}

    def _bound(self, x: Any) -> tuple[Any, list[Any], dict[str, Any]]:
        programs, arguments = len(self._tables.tensors) // self._blocks.rows, [self._tables]
        if x.stored is not None:
            programs = len(self._tiles[x.stored]) // self._blocks.tiles
            arguments.append(self._tiles[x.stored])
        return x.kernel[(programs,)], arguments, x.constants | x.options

    def prepare(self) -> bool:
        """Read gradients and data pointers afresh; nothing reaches the device yet."""
        return native.prepare(self._native, self.spec, "triton")

    def step(self, config: StepConfig) -> None:
        """Write the tables where they changed, and launch; the host does not wait."""
        self._launch("step", config)
        self._native.finish()

    def norms(self, config: StepConfig) -> Tensor:
        """Two launches: over the tiles, then over the layers."""
        self._launch("norms", config)
        return self._totals[:, 1].clone()

    def measure(self, config: StepConfig) -> Tensor:
        """The launches of a step up to the sums of each layer."""
        self._launch("measure", config)
        return self._totals.clone()

    def apply(self, config: StepConfig, sums: Tensor) -> None:
        """The launches of a step that follow the sums."""
        self._totals.copy_(sums)
        self._launch("apply", config)
        self._native.finish()

    def forget(self) -> None:
        """Let go of the gradients, and of copies of what lies otherwise than the plan."""
        self._native.forget()

    @property
    def _totals(self) -> Tensor:
        totals: Tensor = self._tables.totals[: len(self.spec.table.layers)]
        return totals

    def _launch(self, method: str, config: StepConfig) -> None:
        with torch.accelerator.device_index(self.spec.table.device.index):
            self._write("tensors", self._native.rows())
            self._write("memory", self._native.memory_pointers())
            self._configure(config)
            measured = self.spec.rule is not None or config.skips
            for kernel, arguments, constants in self._launches[measured][method]:
                kernel(*arguments, **constants)

    def refresh(self, config: StepConfig) -> None:
        """Write the numbers."""
        with torch.accelerator.device_index(self.spec.table.device.index):
            self._known.pop("config", None)
            self._configure(config)

    def _configure(self, config: StepConfig) -> None:
        """Write the step's numbers, in the order of ``kernels.tables``."""
        if "config" in self._known:  # what is copied on the device differs from what is sent later
            self._known["config"][list(config.tensors)] = UNREAD
        self._write("config", torch.tensor(config.values, dtype=torch.float64))
        for place, x in config.tensors.items():
            self._tables.config[place : place + 1].copy_(x.reshape(1))

    def _write(self, name: str, value: Tensor) -> None:
        """Bring a table up to date, in stream order; graphs share the numbers, not the pointers."""
        known, table = self._known.get(name), getattr(self._tables, name)
        same = known is not None and torch.equal(known, value)
        if devices.capturing(self.spec.table.device):
            if not same:
                raise RuntimeError(
                    "backend 'triton' can be captured in a CUDA graph only after a step with the "
                    "same numbers (optimizer.refresh()) and the same gradient tensors "
                    "(zero_grad(set_to_none=False)): take one, or use backend='cuda'"
                )
            self._captured.setdefault(name, []).append(table)
            return
        read = any(table is x for x in self._captured.get(name, ()))
        if same and not (read and name == "config"):  # a graph may have copied a tensor lr there
            return
        if read and name != "config":
            table = table.clone()
            self._tables = self._tables._replace(**{name: table})
            self._bind()
        self._known[name] = value
        value = value.pin_memory() if table.is_cuda else value
        table[: len(value)].copy_(value, non_blocking=True)


def _tables(spec: PlanSpec, block: int, multiple: int) -> dict[str, Tensor]:
    """The tables of ``kernels.Tables``, those of tensors and layers in whole blocks of rows."""
    table = spec.table
    n = max(len(table.params), len(table.layers))
    n += -n % multiple
    spans = torch.tensor([*(_span(spec, span) for span in table.spans), [0] * 4])
    tiles = _tiles(spans, block)
    of_tiles = spans[tiles[:-1].long()]
    layers, parts = torch.zeros(n, 8, dtype=torch.int64), torch.zeros(n, 8, dtype=torch.int64)
    for ranges, members in ((layers, of_tiles[:, 1]), (parts, spans[:-1, 0])):
        sizes = members.bincount(minlength=n)
        ranges[:, 1] = sizes.cumsum(0)
        ranges[:, 0] = ranges[:, 1] - sizes
    layers[: len(table.layers), 2] = torch.tensor(table.ruled)
    lr_scale, start_radius = torch.zeros(2, n, dtype=torch.float64)
    lr_scale[: len(table.layers)] = torch.tensor(table.lr_scale, dtype=torch.float64)
    start_radius[: len(table.layers)] = torch.tensor(table.start_radius, dtype=torch.float64)
    return {
        "tensors": torch.zeros(n, _C.ROW["size"], dtype=torch.int64),
        "spans": spans,
        "tiles": tiles,
        "layers": layers,
        "parts": parts,
        "lr_scale": lr_scale,
        "start_radius": start_radius,
        "memory": torch.zeros(n, dtype=torch.int64),
        "config": torch.zeros(_C.CONFIG["size"], dtype=torch.float64),
        "scalars": torch.zeros(n, 8, dtype=torch.float64),
        "sums": torch.zeros(len(tiles), 4, dtype=torch.float64),
        "totals": torch.zeros(n, 4, dtype=torch.float64),
        "scales": torch.zeros(n, 8, dtype=torch.float64),
    }


def _span(spec: PlanSpec, span: Span) -> list[int]:
    """Tensor, layer, first element and last + 1; with codes as if blocks were whole."""
    p = spec.table.params[span.tensor]
    row = row_length(p)
    if _kind(spec, span.tensor)[1] == "codes":
        row = codes.blocks_of(p.shape) * _C.CODE_BLOCK
    return [span.tensor, span.layer, span.begin * row, span.end * row]


def _tiles(spans: Tensor, block: int) -> Tensor:
    """Span of each tile, by layer, then that of the empty span at the end.

    A span without elements has an empty tile, since it takes part too. Instead of its first element
    a span says then where tile 0 would begin: each tile begins its number times ``block`` later.
    """
    order = torch.cat([spans[:-1, 1].argsort(stable=True), torch.tensor([len(spans) - 1])])
    sizes = spans[order, 3] - spans[order, 2]
    counts = ((sizes + block - 1) // block).clamp(min=1)
    spans[order, 2] -= (counts.cumsum(0) - counts) * block
    return order.repeat_interleave(counts).int()


def _kind(spec: PlanSpec, i: int) -> tuple[str, str]:
    """How the elements of tensor i are stored: dtype, and kind of its states."""
    dtype = str(spec.table.params[i].dtype.to_real()).removeprefix("torch.")
    state, keys = spec.states[i], spec.direction.states
    if not (keys and state) or not codes.is_coded(state[keys[0]]):
        return dtype, "plain"
    return dtype, "codes" if codes.is_codes(state[keys[0]]) else "bfloat16"


def _by_kind(
    spec: PlanSpec, spans: Tensor, tiles: Tensor, multiple: int
) -> dict[tuple[str, str], Tensor]:
    """Numbers of the tiles of each kind, filled up with that of the last, which is empty."""
    of_params = [_kind(spec, i) for i in range(len(spec.table.params))]
    kinds = list(dict.fromkeys(of_params))
    of_tiles = torch.tensor([kinds.index(k) for k in of_params])[spans[tiles[:-1].long(), 0]]
    found = {}
    for k, kind in enumerate(kinds):
        numbers = (of_tiles == k).nonzero().flatten()
        empty = numbers.new_full((-len(numbers) % multiple,), len(tiles) - 1)
        found[kind] = torch.cat([numbers, empty]).int()
    return found
