"""What to give in place of a constructor's argument that is none of ours."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection
from typing import Any

from . import rules

#: names that apex, timm, bitsandbytes and others have for what is here; more in docs/moving.md
_ELSEWHERE = {
    "adam_w_mode": "True: layerlr.AdamW, False: layerlr.Adam",
    "always_adapt": "adapt='all'",
    "clip_grad_norm": "max_grad_norm=...",
    "decoupled_decay": "rule='relative' for True, rule='lamb' for False",
    "layer_decay": "layerlr.param_groups, or the key lr_factor of param groups",
    "learning_rate": "lr=...",
    "optim_bits": "state_dtype='8bit' for 8",
    "trust_coeff": "rule=layerlr.rules.Lars(trust=...)",
    "trust_coefficient": "rule=layerlr.rules.Lars(trust=...)",
    "use_nvlamb": "adapt='none' in groups without weight decay for False",
}


def as_rule(value: object) -> str:
    """Where a rule's name belongs that was given as something else; empty for what is none."""
    named = isinstance(value, str) and value.lower() in rules.KNOWN
    return f": a rule is given as rule={value!r}" if named else ""


def remedy(owner: type, name: str, value: Any, of_groups: Collection[str]) -> str:
    """Where it belongs, as the end of a message; empty where nobody knows.

    ``of_groups``: keys that param groups have and constructors have not.
    """
    if as_rule(value):
        return as_rule(value)
    places = []
    if name in of_groups:
        places.append(f"it is a key of param groups, {{'params': ..., {name!r}: ...}}")
    owners = [r for r in rules.KNOWN.values() if name in inspect.signature(r).parameters]
    if owners:
        uses = " or ".join(f"rule=layerlr.rules.{r.__name__}({name}=...)" for r in owners)
        places.append(f"it belongs to the rule, {uses}")
    if name in _ELSEWHERE:
        places.append(f"here it is {_ELSEWHERE[name]}")
    close = difflib.get_close_matches(name, inspect.signature(owner).parameters, 1, 0.8)
    if not places and close:
        places.append(f"was {close[0]!r} meant?")
    return f": {'; or '.join(places)}" if places else ""
