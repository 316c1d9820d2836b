"""Layer rotation: how far each layer's weights have turned from where they started."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from layerlr.layers import Adapt

from .cosine import angles, collect, distances, local, moved, norms
from .plotting import draw
from .recorder import Recorder
from .watched import watched_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class RotationCurves(NamedTuple):
    """What `LayerRotation` has recorded.

    Attributes
    ----------
    names : list of str
        The layers.
    steps : list of float
        The step of each record.
    distances : Tensor [records, layers]
        Cosine distance from the start, 0 to 2; float64, on the host.
    angles : Tensor [records, layers] or None
        Angle turned since the record before, in radians; None unless asked for.
    """

    names: list[str]
    steps: list[float]
    distances: Tensor
    angles: Tensor | None


class LayerRotation(Recorder):
    """Record each layer's cosine distance from its start.

    ::

        d(t) = 1 - w(t).w(0) / (|w(t)| |w(0)|)
        theta = 2 arcsin(sqrt(d / 2))

    where theta, the angle turned since the record before, takes d between these two.

    Parameters
    ----------
    model : torch.nn.Module, or iterable of (str, Tensor)
        Whose layers to watch. Of a module, every parameter once (one that is shared, under its
        first name), in the order of registration; it is held, and a parameter that is replaced
        later is found by its name. Pairs, as ``named_parameters()`` gives them, are held as they
        are. The weights as they are now are the start, so build it before training.
    adapt : {"kernels", "all"} or callable (name, parameter) -> bool
        Which parameters are layers; of ``"kernels"`` (default) two dimensions are larger than 1.
    dtype : torch.dtype, optional
        Of the stored start; by default the parameter's, which is exact. Rounded to bfloat16 it
        reads a distance of 1.4e-6 (an angle of 2e-3) at rest, to float16 2e-8 (2e-4).
    device : torch.device or str, optional
        Where the start is kept; by default with its parameter. ``"cpu"`` spares the GPU that
        memory; it is then pinned, and copied over layer by layer at each record.
    angles : bool
        Keep a second copy of the weights, in the same dtype and on the same device, to record
        the angle turned since the record before (since the start at the first).

    Raises
    ------
    ValueError
        If nothing is watched, or what has no values; for a name that is twice, or an odd `dtype`.
    TypeError
        If `model` yields something else than pairs.

    Notes
    -----
    Memory: one copy of the watched weights (two with `angles`) and 8 bytes per record and layer.
    A record reads the weights twice and the start once (with `angles` the weights four times, the
    second copy twice), a piece at a time in float64, which the device must have. It does not wait
    for the device; what was recorded is moved when it is read.

    A vector of norm zero has no direction. Distance and angle are 0 while the weights are zero;
    a layer that starts at zero is measured from the first record at which it is not, and has
    distance 0 until then. Weights with NaN or inf read NaN. These are choices of this package.

    A parametrised weight is watched as the parameters behind it (``parametrizations.*.original``),
    which are what optimizers turn; pass pairs to watch something else.

    Sharded parameters (DTensor): the layer is the whole one, its sums are completed by one
    all-reduce for the norms and one for the distances, so every rank must construct and record.
    Each keeps, saves and loads the start of its own shards.

    A copied or unpickled monitor watches the copy of the model that went with it.

    References
    ----------
    Carbonnelle & De Vleeschouwer, "Layer rotation" (arXiv 1806.01603): the distance, over the
    flattened kernels in float64, and the plot. Their callback records after the first batch of
    each epoch; here the caller chooses. The angle is the one Layca sets to arctan(lr) in a step.
    """

    _start_norms: list[Tensor]
    _waiting: list[int]  # layers that started at zero

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, Tensor]],
        *,
        adapt: str | Adapt = "kernels",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        angles: bool = False,
    ) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be of floating point, got {dtype}")
        watched = watched_layers(model, adapt)
        tags = {"distance": "rotation"} | ({"angle": "rotation_angle"} if angles else {})
        super().__init__(list(watched), tags)
        self._source = model if isinstance(model, nn.Module) else watched
        self._device = None if device is None else torch.device(device)
        weights = list(watched.values())
        with torch.no_grad():
            self._start = [self._keep(local(w), dtype) for w in weights]
            self._previous = [self._keep(local(w), dtype) for w in weights] if angles else None
            self._measure_start(weights)

    @torch.no_grad()
    def record(self, step: float | None = None) -> None:
        """Take one point of every curve from the weights as they are now.

        Parameters
        ----------
        step : int or float, optional
            The number of the step, or of the epoch; by default one more than at the last record,
            1 at the first. The start is at 0.

        Raises
        ------
        ValueError
            For no number as step; for a layer that is gone or has another shape than its start.
        """
        number = self._number(step)
        weights = [self._weight(i) for i in range(len(self.names))]
        weight_norms = norms([local(w) for w in weights], weights)
        self._follow(self._start, weights)
        self._start_norms = [
            moved(n, w.device) for n, w in zip(self._start_norms, weights, strict=True)
        ]
        self._latch(weights, weight_norms)
        row = [distances(self._start, self._start_norms, weights, weight_norms)]
        if self._previous is not None:
            self._follow(self._previous, weights)
            previous_norms = norms(self._previous, weights)
            row.append(angles(distances(self._previous, previous_norms, weights, weight_norms)))
            for previous, w in zip(self._previous, weights, strict=True):
                _copy(previous, local(w))
        self._append(number, torch.stack(row))

    def curves(self) -> RotationCurves:
        """Return everything recorded, without the start (at which every distance is 0)."""
        turned = self._series("angle") if self._previous is not None else None
        return RotationCurves(list(self.names), list(self._steps), self._series("distance"), turned)

    def plot(self, path_or_axes: str | os.PathLike[str] | Axes, key: str = "distance") -> Axes:
        """Draw the curves as the paper does, a line per layer in viridis.

        The first layer is dark, the last yellow. Distances have a 0 at step 0 put before them and
        a vertical axis from 0 to 1 (what lies beyond, an obtuse angle, is cut off).

        Parameters
        ----------
        path_or_axes : path or matplotlib.axes.Axes
            A picture to write (PNG, or what the suffix names), or axes to draw into.
        key : {"distance", "angle"}
            Which curves.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ValueError
            If that is not recorded.
        """
        values, steps = self._series(key), self._steps
        if key == "angle":
            label = "angle since the record before (radians)"
            return draw(path_or_axes, self.names, steps, values, label=label)
        values = torch.cat([values.new_zeros(1, len(self.names)), values])
        label = "cosine distance from the start"
        return draw(path_or_axes, self.names, [0, *steps], values, label=label, limits=(0.0, 1.0))

    def state_dict(self) -> dict[str, Any]:
        """Return the records, the start and, with angles, the weights at the last record.

        Returns
        -------
        dict
            As `Recorder.state_dict`, with ``start`` and ``previous`` (a list of tensors, or
            None). Tensors, strings and plain numbers, for ``torch.load(weights_only=True)``.
        """
        # Reading the records also waits for the last record's copies into pinned memory.
        previous = None if self._previous is None else list(self._previous)
        return super().state_dict() | {"start": list(self._start), "previous": previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved monitor: its start, its records.

        The tensors keep the dtype they were saved in (curves go on without a jump) and go to the
        device that this monitor was built for.

        Parameters
        ----------
        state : dict
            What `state_dict` returned.

        Raises
        ------
        ValueError
            If it has other layers, other shapes, or was saved with another choice of `angles`;
            nothing is changed then.
        """
        if state["names"] != self.names:
            odd = [name for name in state["names"] if name not in self.names]
            odd += [name for name in self.names if name not in state["names"]]
            which = f"only one of them has {odd[0]!r}" if odd else "the order differs"
            raise ValueError(f"saved from other layers than this monitor watches: {which}")
        weights = [self._weight(i) for i in range(len(self.names))]
        for key in ("start", "previous"):
            for name, saved, w in zip(self.names, state[key] or (), weights, strict=False):
                if saved.shape != local(w).shape:
                    shapes = f"{tuple(saved.shape)}, the parameter {tuple(local(w).shape)}"
                    raise ValueError(f"saved {key} of layer {name!r} has shape {shapes}")
        super().load_state_dict(state)
        with torch.no_grad():
            self._start = [t.clone() for t in state["start"]]
            self._follow(self._start, weights)
            if self._previous is not None:
                self._previous = [t.clone() for t in state["previous"]]
                self._follow(self._previous, weights)
            self._measure_start(weights)

    def _weight(self, i: int) -> Tensor:
        """Return the present parameter of a layer."""
        name = self.names[i]
        try:
            if isinstance(self._source, nn.Module):
                weight: Tensor = self._source.get_parameter(name)
            else:
                weight = self._source[name]
        except AttributeError as error:
            raise ValueError(f"layer {name!r} is gone from the model: {error}") from error
        here, start = local(weight).shape, self._start[i].shape
        if here != start:
            raise ValueError(f"layer {name!r} has shape {tuple(here)}, its start {tuple(start)}")
        return weight

    def _keep(self, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Return a copy to store."""
        copy = weight.to(dtype or weight.dtype, copy=True, memory_format=torch.contiguous_format)
        return self._place(copy, weight)

    def _place(self, stored: Tensor, weight: Tensor) -> Tensor:
        """Return a stored copy where it belongs, itself if it is there."""
        stored = stored.to(self._device or weight.device)
        return stored.pin_memory() if weight.is_cuda and not stored.is_cuda else stored

    def _follow(self, stored: list[Tensor], weights: list[Tensor]) -> None:
        """Move stored copies after parameters that have moved to another device."""
        stored[:] = [self._place(t, w) for t, w in zip(stored, weights, strict=True)]

    def _measure_start(self, weights: list[Tensor]) -> None:
        """Compute the norms of the start, and note the layers that have none yet."""
        self._start_norms = norms(self._start, weights)
        self._waiting = collect(self._start_norms).eq(0).nonzero().flatten().tolist()

    def _latch(self, weights: list[Tensor], weight_norms: list[Tensor]) -> None:
        """Take the weights as the start of layers that started at zero and still have none."""
        if not self._waiting:
            return
        # Without asking the device, so these layers are looked at in every record.
        for i in self._waiting:
            now = (self._start_norms[i] == 0) & weight_norms[i].isfinite()
            here = local(weights[i])
            start = moved(self._start[i], here.device)
            _copy(self._start[i], torch.where(now, here.to(start.dtype), start))
        late = norms([self._start[i] for i in self._waiting], [weights[i] for i in self._waiting])
        for i, norm in zip(self._waiting, late, strict=True):
            self._start_norms[i] = norm


def _copy(stored: Tensor, weight: Tensor) -> None:
    """Overwrite a stored copy; into pinned memory without waiting, so converted beforehand."""
    stored.copy_(weight.to(stored.dtype).contiguous(), non_blocking=True)
