"""What to give in place of a constructor's argument that is none of ours."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection
from typing import Any

from . import rules

#: names that apex, timm, bitsandbytes and others have for what is here; more in docs/moving.md
_ELSEWHERE = {
    "adam_w_mode": "layerlr.AdamW for True, layerlr.Adam for False",
    "always_adapt": "adapt='all' for True",
    "clamp_value": "rule=layerlr.rules.Lamb(clip=...)",
    "clip_grad_norm": "max_grad_norm=...",
    "decoupled_decay": "rule='relative' for True, rule='lamb' for False",
    "decoupled_weight_decay": "layerlr.AdamW for True, layerlr.Adam for False",
    "eta": "rule=layerlr.rules.Lars(trust=...)",
    "exclude_from_layer_adaptation": "adapt, which governs kernels unless it says otherwise",
    "exclude_from_weight_decay": "layerlr.param_groups(model, no_decay=...)",
    "layer_decay": "the key lr_factor of param groups, a number or one for each layer",
    "learning_rate": "lr=...",
    "no_decay": "layerlr.param_groups(model, no_decay=...)",
    "optim_bits": "state_dtype='8bit' for 8",
    "trust_coeff": "rule=layerlr.rules.Lars(trust=...)",
    "trust_coefficient": "rule=layerlr.rules.Lars(trust=...)",
    "use_nvlamb": "adapt='none' in groups without weight decay for False",
    "weight_decouple": "layerlr.AdamW for True, layerlr.Adam for False",
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
    known = [*inspect.signature(owner).parameters, *of_groups]
    close = difflib.get_close_matches(name.lower(), known, 1, 0.8)
    if not places and close:
        places.append(f"was {close[0]!r} meant?")
    return f": {'; or '.join(places)}" if places else ""
