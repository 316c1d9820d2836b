"""timm's optimizer factory."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from layerlr import optimizers


def register() -> list[str]:
    """Make every class known to timm's factory, as ``"layerlr-adamw"`` and so on.

    What the factory hands over (momentum, eps, betas) goes to the classes that have it; momentum is
    timm's 0.9 where it is not given. A second call changes nothing.

    Returns
    -------
    list of str
        The names, for ``create_optimizer_v2`` and ``--opt``.

    Raises
    ------
    ImportError
        Without timm, or where a release keeps its registry elsewhere; tried with timm 1.0.31.

    Examples
    --------
    >>> layerlr.integrations.timm.register()
    >>> opt = timm.optim.create_optimizer_v2(model, "layerlr-adamw", lr=2**-6, rule="lamb")

    From the shell, with timm's own ``train.py`` as it is::

        python -m layerlr.integrations train.py DATA --opt layerlr-adamw --opt-kwargs rule=lamb
    """
    registry, info = _factory()
    classes = {f"layerlr-{name.lower()}": getattr(optimizers, name) for name in optimizers.__all__}
    known = set(registry.list_optimizers())
    for name, cls in classes.items():
        if name not in known:
            takes = inspect.signature(cls).parameters
            has = {f"has_{a}": a in takes for a in ("eps", "momentum", "betas")}
            description = f"layer-wise {cls.__name__}"
            registry.register(info(name, cls, description=description, **has))
    return list(classes)


def _factory() -> tuple[Any, Any]:
    """timm's registry and its record of an optimizer."""
    try:
        factory = importlib.import_module("timm.optim._optim_factory")
        return factory.default_registry, factory.OptimInfo
    except ModuleNotFoundError as error:
        if error.name == "timm":
            raise ImportError("layerlr.integrations.timm needs timm: pip install timm") from None
        if not (error.name or "").startswith("timm."):
            raise  # what timm itself misses
        reason: Exception = error
    except AttributeError as error:
        reason = error
    raise ImportError(
        "this timm keeps its registry of optimizers elsewhere than 1.0.31 does: give it the class, "
        "or make the optimizer yourself"
    ) from reason
