"""Which parameters a monitor watches."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from layerlr.layers import Adapt, governs


def watched_layers(
    model: nn.Module | Iterable[tuple[str, Tensor]], adapt: str | Adapt
) -> dict[str, Tensor]:
    """Return the watched parameters by name, in order, each tensor once.

    Parameters
    ----------
    model : torch.nn.Module, or iterable of (str, Tensor)
        Whose parameters.
    adapt : {"kernels", "all"} or callable (name, parameter) -> bool
        Which of them, as an optimizer takes it.

    Raises
    ------
    ValueError
        If no parameter is watched, one is uninitialised, a name occurs twice, or `adapt` is
        unknown.
    TypeError
        If `model` yields something else than pairs.
    """
    if not (callable(adapt) or adapt in ("all", "kernels")):
        raise ValueError(
            f"Invalid adapt: {adapt!r}, wanted 'kernels', 'all' or a callable (name, param)"
        )
    watched: dict[str, Tensor] = {}
    seen: set[int] = set()
    for pair in model.named_parameters() if isinstance(model, nn.Module) else model:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(
                f"wanted a module or (name, parameter) pairs, got a {type(pair).__name__}: "
                "pass model or model.named_parameters()"
            )
        name, weight = pair
        if nn.parameter.is_lazy(weight):
            raise ValueError(f"parameter {name!r} is uninitialised: run the model once before")
        if id(weight) in seen or not governs(adapt, name, weight):
            continue
        if name in watched:
            raise ValueError(f"two parameters are named {name!r}")
        watched[name] = weight
        seen.add(id(weight))
    if not watched:
        raise ValueError(f"no layer to watch: adapt={adapt!r} excludes every parameter")
    return watched
