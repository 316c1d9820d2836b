"""What an optimizer says once: options that change nothing, or hardly what is meant."""

from __future__ import annotations

import dis
import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from types import CodeType
from typing import Any

from torch import Tensor

from . import options, rules, unknown_arguments
from .directions import Direction
from .directions.adam import Adam

#: keys of a group beside options and arguments: other optimizers have them, or they are labels
_OTHERS = {
    *("params", "param_names", "estimated", "amsgrad", "betas", "capturable", "centered"),
    *("dampening", "decoupled_weight_decay", "differentiable", "eps", "etas", "foreach", "fused"),
    *("initial_lr", "lr", "maximize", "momentum", "nesterov", "step", "weight_decay"),
    *("group_name", "label", "name", "tag"),
}


def give(
    said: set[str],
    owner: type,
    group: dict[str, Any],
    defaults: Mapping[str, Any],
    direction: Direction,
    governed: bool,
) -> None:
    """Warn of a group's options without effect, or without sense, each kind once.

    Parameters
    ----------
    said
        What was said before, by kind; added to.
    owner
        The optimizer's class.
    defaults
        The optimizer's, whose keys every group has.
    governed
        Whether the rule governs a parameter of the group.
    """
    known = _OTHERS | defaults.keys()
    for kind, message in _about(owner, group, known, direction, governed):
        once(said, kind, message)


def once(said: set[str], kind: str, message: str) -> None:
    """Warn, unless something of the kind was said before."""
    if kind not in said:
        said.add(kind)
        warnings.warn(message, UserWarning, stacklevel=level_of_the_caller())


def give_of_step(said: set[str], group: dict[str, Any]) -> None:
    """Warn, once, of what a group's coming step does that was hardly meant.

    That is an lr above the one at which what follows it by its ratio is meant, and an ``adapt`` by
    names that nobody gave.
    """
    lr, reference = group["lr"], group.get("reference_lr")
    kind = key_of("reference_lr")
    if kind not in said and _is_above(lr, reference):
        message = (
            f"lr={lr:g} is above reference_lr={reference:g}, so what follows lr by its ratio "
            f"(plain_lr, corrected_decay, a wrapper's base) is {lr / reference:.3g} times what was "
            "given: give the constructor the largest lr of the schedule, or set the group's "
            "'reference_lr'"
        )
        once(said, kind, message)
    kind = "adapt without names"
    if kind not in said and group.get("param_names") is None and _asks_names(group["adapt"]):
        message = (
            "adapt is asked with names such as 'group0.param0', as the parameters came without: "
            "pass model.named_parameters() or call attach(model)"
        )
        once(said, kind, message)


def _is_above(lr: float | Tensor, reference: float | None) -> bool:
    """Whether the host knows a rate to be above another."""
    return reference is not None and not isinstance(lr, Tensor) and lr > reference * (1 + 1e-6)


def give_of_all(
    groups: Sequence[dict[str, Any]], *, governed: bool, forgotten: bool, coded: bool, held: bool
) -> None:
    """Warn of options that nothing in any group follows.

    Parameters
    ----------
    groups
        All of a new optimizer's.
    governed, coded, held
        Whether a parameter is governed, has state in fewer bits, is held in 16 bits with more.
    forgotten
        Whether no rule was given, not even None.
    """
    for message in _of_all(groups, governed, forgotten, coded, held):
        warnings.warn(message, UserWarning, stacklevel=level_of_the_caller())


def _of_all(
    groups: Sequence[dict[str, Any]], governed: bool, forgotten: bool, coded: bool, held: bool
) -> Iterator[str]:
    wanted = [g["rule"] for g in groups if g["rule"] is not None and g["adapt"] != "none"]
    if wanted and not governed:
        yield (
            f"rule {wanted[0].name!r} governs none of the parameters, and all take the plain step: "
            "it is for kernels (two or more dimensions larger than 1) unless adapt='all'"
        )
    in_bits = [g["state_dtype"] for g in groups if g["state_dtype"] != "float32"]
    chosen = [
        f"{key}={g[key]!r}"
        for g in groups
        for key, usual in (("adapt", None), ("layers", "tensor"))
        if g[key] != usual
    ]
    unused = not in_bits and all(g["rule"] is g["on_nonfinite"] is None for g in groups)
    if chosen and forgotten and unused:
        yield f"{chosen[0]} has no effect without a rule: was rule='layca' or another meant?"
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


def _share(group: dict[str, Any], direction: Direction) -> float:
    """The least share that a step has in a second moment, 0 of a sum; 1 where there is none."""
    if not {*direction.nonnegative} & {*direction.states}:
        return 1.0
    beta = group["betas"][1] if "betas" in group else group.get("alpha", 1.0)
    return 1.0 - float(beta)


def key_of(key: str) -> str:
    """The kind of what is said of a key, for ``said``."""
    return f"key {key}"


@functools.cache
def _arguments(owner: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(owner).parameters


def _asks_names(adapt: Any) -> bool:
    """Whether a function looks at its first argument."""
    code = getattr(adapt, "__code__", None)
    return code is not None and _reads_its_first(code)


@functools.cache  # by the code, which keeps nothing alive that a function has closed over
def _reads_its_first(code: CodeType) -> bool:
    first = code.co_varnames[:1] if code.co_argcount else ()
    return any(name in _names(i.argval) for i in dis.get_instructions(code) for name in first)


def _names(of_instruction: Any) -> tuple[Any, ...]:
    return of_instruction if isinstance(of_instruction, tuple) else (of_instruction,)


def _about(
    owner: type, group: dict[str, Any], known: Set[str], direction: Direction, governed: bool
) -> Iterator[tuple[str, str]]:
    rule = group["rule"]
    arguments = _arguments(owner)
    ours = options.OPTIONS | options.GROUP_ONLY
    for key in sorted(group.keys() - arguments.keys() - ours.keys() - known):
        remedy = unknown_arguments.remedy(owner, key, group[key], options.GROUP_ONLY)
        if key.replace("_", "") == "lrscale":
            foreign = key == "lr_scale" and isinstance(group[key], (int, float))  # timm's, a number
            remedy = "" if foreign else ": was 'lr_factor' meant?"
        if remedy:
            yield key_of(key), f"layerlr knows no param-group key {key!r}{remedy}"
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
    if group["state_dtype"] == "bfloat16" and _share(group, direction) < 2.0**-8:
        yield (
            "state_dtype",
            "second moments in bfloat16 stand still where what a step adds is below half of their "
            "last bit, and steps stay small after large gradients: take a beta2 (alpha) of 0.99 or "
            "less, or state_dtype='float32'",
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
