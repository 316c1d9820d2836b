"""Layer rules: frozen dataclasses that turn a layer's sums into its scale."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from .adam_mini import AdamMini
from .back_matching import BackMatching
from .base import LayerRule, LayerScale, LayerStats
from .brake import Brake
from .curvature import Curvature
from .hyperball import Hyperball
from .lamb import Lamb, Relative
from .lars import Lars
from .layca import Layca
from .plain import Plain
from .rated import Estimated, Rated
from .singh import Singh

_FORMULAS = (Plain, Singh, Lars, Lamb, Layca, Rated, Hyperball, Relative, Brake, AdamMini)
#: name -> class of each formula; the native engines know the same names
RULES: dict[str, type[LayerRule]] = {r.name: r for r in _FORMULAS}
#: name -> class of those that look at the model for their rates
ESTIMATED: dict[str, type[Estimated]] = {r.name: r for r in (Curvature, BackMatching)}
#: name -> class of every rule that may be named; a class of optimizers has the other to itself
KNOWN: dict[str, type[LayerRule]] = RULES | ESTIMATED
del KNOWN[AdamMini.name]

#: what stands for a rule: its name (capitals or not), the rule itself or its class, its name with
#: hyper-parameters as configuration files have them (``{"name": "lamb", "clip": 10.0}``), or none
Rule = str | LayerRule | type[LayerRule] | Mapping[str, Any] | None


def resolve(rule: Rule) -> LayerRule | None:
    """Rule from a name, a rule, a rule's class, a mapping as in a state dict, or None.

    Raises
    ------
    ValueError
        For an unknown name; the message lists the known ones. For a mapping without a name.
    TypeError
        For any other kind of value.
    """
    if rule is None or isinstance(rule, LayerRule):
        return rule
    if isinstance(rule, str):
        return _lookup(rule)()
    if isinstance(rule, type) and issubclass(rule, LayerRule):
        return rule()
    if isinstance(rule, Mapping):
        options = dict(rule)
        if "name" not in options:
            raise ValueError(
                f"a rule that is a mapping needs its name, {{'name': 'lamb', ...}}, got {options}"
            )
        cls = _lookup(str(options.pop("name")))
        known = inspect.signature(cls).parameters
        for key in options.keys() - known.keys():
            raise TypeError(
                f"rule {cls.name!r} has no {key!r}, known are {', '.join(known) or 'no others'}"
            )
        return cls(**options)
    raise TypeError(f"rule must be None, a name or a layerlr.rules.LayerRule, got {rule!r}")


def is_estimated(rule: Rule) -> bool:
    """Whether a rule looks at the model for its rates."""
    return isinstance(rule if isinstance(rule, LayerRule) else resolve(rule), Estimated)


def _lookup(name: str) -> type[LayerRule]:
    try:
        return (RULES | ESTIMATED)[name.lower()]
    except KeyError:
        known = ", ".join(repr(n) for n in KNOWN)
        raise ValueError(
            f"unknown rule {name!r}, known are {known}, and None (null in YAML) for none"
        ) from None


__all__ = [
    "ESTIMATED",
    "KNOWN",
    "RULES",
    "AdamMini",
    "BackMatching",
    "Brake",
    "Curvature",
    "Estimated",
    "Hyperball",
    "Lamb",
    "Lars",
    "Layca",
    "LayerRule",
    "LayerScale",
    "LayerStats",
    "Plain",
    "Rated",
    "Relative",
    "Rule",
    "Singh",
    "is_estimated",
    "resolve",
]
