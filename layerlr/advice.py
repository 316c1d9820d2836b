"""What an optimizer says once: options that change nothing, or hardly what is meant."""

from __future__ import annotations

import difflib
import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import options, rules
from .directions import Direction
from .directions.adam import Adam

#: keys of a group beside options and constructor arguments
_OTHERS = ("params", "param_names", "estimated")


def give(
    said: set[str], owner: type, group: dict[str, Any], direction: Direction, governed: bool
) -> None:
    """Warn of a group's options without effect, or without sense, each kind once.

    Parameters
    ----------
    said
        What was said before, by kind; added to.
    owner
        The optimizer's class.
    governed
        Whether the rule governs a parameter of the group.
    """
    for kind, message in _about(owner, group, direction, governed):
        if kind not in said:
            said.add(kind)
            warnings.warn(message, UserWarning, stacklevel=level_of_the_caller())


def give_of_all(
    groups: Sequence[dict[str, Any]], *, governed: bool, coded: bool, held: bool
) -> None:
    """Warn of options that nothing in any group follows.

    Parameters
    ----------
    groups
        All of a new optimizer's.
    governed, coded, held
        Whether a parameter is governed, has state in fewer bits, is held in 16 bits with more.
    """
    for message in _of_all(groups, governed, coded, held):
        warnings.warn(message, UserWarning, stacklevel=level_of_the_caller())


def _of_all(
    groups: Sequence[dict[str, Any]], governed: bool, coded: bool, held: bool
) -> Iterator[str]:
    wanted = [g["rule"] for g in groups if g["rule"] is not None and g["adapt"] != "none"]
    if wanted and not governed:
        yield (
            f"rule {wanted[0].name!r} governs none of the parameters, and all take the plain step: "
            "it is for kernels (two or more dimensions larger than 1) unless adapt='all'"
        )
    in_bits = [g["state_dtype"] for g in groups if g["state_dtype"] != "float32"]
    if in_bits and not coded:
        yield (
            f"state_dtype={in_bits[0]!r} has no effect: no parameter has state that it changes "
            "(layerlr.codes says which have)"
        )
    precisions = [g["precision"] for g in groups if g["precision"] is not None]
    if precisions and not held:
        yield (
            f"precision={precisions[0]!r} has no effect: it is for bfloat16 and float16 parameters"
        )


def level_of_the_caller() -> int:
    """``stacklevel`` of the first frame that is neither ours nor torch's."""
    level, frame = 1, inspect.currentframe()
    while (frame := frame and frame.f_back) is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("layerlr", "torch"):
            break
        level += 1
    return level


@functools.cache
def _arguments(owner: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(owner).parameters


def _about(
    owner: type, group: dict[str, Any], direction: Direction, governed: bool
) -> Iterator[tuple[str, str]]:
    rule = group["rule"]
    arguments = _arguments(owner)
    ours = options.OPTIONS | options.GROUP_ONLY
    for key in group.keys() - arguments.keys() - ours.keys() - {*_OTHERS}:
        close = difflib.get_close_matches(key, ours, 1, 0.8)
        foreign = key == "lr_scale" and isinstance(group[key], (int, float))  # timm's, a number
        if key.replace("_", "") == "lrscale" and not foreign:
            close = ["lr_factor"]
        if close:
            yield key, f"layerlr knows no param-group key {key!r}: was {close[0]!r} meant?"
    if "backend" in group:
        yield "backend", "backend is no param-group key and has no effect: give the constructor one"
    decay = group["weight_decay"]  # a default is nobody's wish, and not spoken of
    usual = arguments["weight_decay"].default if "weight_decay" in arguments else 0
    if (
        governed
        and isinstance(rule, rules.Layca)
        and group.get("decoupled_weight_decay")
        and isinstance(decay, (int, float))
        and decay not in (0, usual)
    ):
        yield (
            "weight_decay",
            f"weight_decay={decay} has no effect on layers under {rule.name!r}, which keeps their "
            "norms; other parameters decay",
        )
    lr = group["lr"]
    if governed and isinstance(rule, rules.Curvature) and isinstance(lr, (int, float)) and lr != 1:
        layers = "" if group["layers"] == "module" else " and layers='module'"
        yield (
            "curvature",
            f"rule 'curvature' finds the length of the step itself, and lr={lr:g} is a factor on "
            f"it: pass lr=1{layers} to have the rule's own",
        )
    for name, what in (
        ("bias_correction", "whose moments are not corrected"),
        ("grad_averaging", "which has no such average"),
    ):
        if not getattr(rule, name, True) and not isinstance(direction, Adam):
            yield (
                name,
                f"{type(rule).__name__}({name}=False) has no effect on {owner.__name__}, {what}: "
                "it is for Adam and AdamW",
            )
