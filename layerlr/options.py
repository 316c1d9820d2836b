"""The options that every optimizer of this package has beside torch's: one table.

The keyword arguments of the constructors, their documentation and signature, the keys of param
groups and what is refused follow from it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, get_args, get_type_hints

import torch

from . import backends, plain_lr, precision, rules, unknown_arguments
from .codes import StateDtype
from .conditions import holds, plain_value
from .layers import Adapt, LayerKey, names_of
from .precision import Precision
from .rules import Rule

OnNonfinite = Literal["skip", "propagate"] | None

Group = dict[str, Any]


class Option(NamedTuple):
    """An option: its default, and what refuses a value in a group."""

    default: Any
    check: Callable[[Group, int], None] | None = None


# -- what is refused -------------------------------------------------------------------------------


def _check_layers(group: Group, index: int) -> None:
    layers = group["layers"]
    if not (callable(layers) or layers in ("tensor", "module")):
        raise ValueError(
            f"Invalid layers: {layers!r}, wanted 'tensor', 'module' or a callable (name, param)"
        )
    if layers == "module" and group.get("param_names") is None:
        raise ValueError(
            "layers='module' needs parameter names: pass model.named_parameters() instead of "
            "model.parameters(), or call optimizer.attach(model) and set the group's 'layers' then"
        )


def _check_adapt(group: Group, index: int) -> None:
    adapt = group["adapt"]
    if not (adapt is None or callable(adapt) or adapt in ("all", "kernels", "none")):
        raise ValueError(
            f"Invalid adapt: {adapt!r}, wanted None, 'all', 'kernels', 'none' or a callable (name, "
            f"param){unknown_arguments.as_rule(adapt)}"
        )


def _check_on_nonfinite(group: Group, index: int) -> None:
    if group["on_nonfinite"] not in (None, "skip", "propagate"):
        raise ValueError(
            f"Invalid on_nonfinite: {group['on_nonfinite']!r}, wanted None, 'skip' or 'propagate'"
        )


def _check_max_grad_norm(group: Group, index: int) -> None:
    max_grad_norm(group)


def max_grad_norm(group: Group) -> float | None:
    """A group's bound on the norm of all gradients; None where it has none, or 0.

    Raises
    ------
    ValueError
        For a bound below 0, and where it does not go with the rule.
    """
    limit = group.get("max_grad_norm")
    if limit is None:
        return None
    if not holds(lambda x: x >= 0.0, limit):
        raise ValueError(f"Invalid max_grad_norm: {limit!r}, wanted None or a number >= 0")
    if limit == 0.0:
        return None
    if rules.is_estimated(group["rule"]):
        raise ValueError(
            f"max_grad_norm does not go with rule {group['rule'].name!r}, whose rates are those of "
            "the unclipped step: call torch.nn.utils.clip_grad_norm_ before it"
        )
    return float(limit)


def _check_precision(group: Group, index: int) -> None:
    wanted = group["precision"]
    if wanted not in (None, *precision.KEYS):
        raise ValueError(
            f"Invalid precision: {wanted!r}, wanted None, 'master', 'stochastic' or 'kahan'"
        )
    if wanted is not None and group["differentiable"]:
        raise ValueError("precision does not work with differentiable=True, which cannot round")
    for name, p in zip(names_of(group, index), group["params"], strict=True):
        if wanted == "stochastic" and p.dtype == torch.float16:
            raise ValueError(
                f"precision='stochastic' rounds to bfloat16, parameter {name!r} is {p.dtype}: use "
                "precision='master' or precision='kahan'"
            )


def _check_state_dtype(group: Group, index: int) -> None:
    wanted = group["state_dtype"]
    if wanted not in get_args(StateDtype):
        raise ValueError(f"Invalid state_dtype: {wanted!r}, wanted 'float32', 'bfloat16' or '8bit'")
    if wanted == "float32":
        return
    if group["differentiable"]:
        raise ValueError("state_dtype does not work with differentiable=True, which cannot round")
    if group.get("centered"):
        raise ValueError(
            f"state_dtype={wanted!r} does not work with centered=True: what is left of two rounded "
            "means can be below zero, and has no root; use state_dtype='float32'"
        )


def _check_seed(group: Group, index: int) -> None:
    seed = plain_value(group.get("seed"))
    if seed is not None and not isinstance(seed, int):
        raise ValueError(f"Invalid seed: {seed!r}, wanted None or an integer")
    if seed is not None:
        group["seed"] = seed


# -- the table -------------------------------------------------------------------------------------


class LayerwiseOptions(TypedDict, total=False):
    """Keyword arguments of every constructor; all but ``backend`` are keys of param groups.

    rule : str, layerlr.rules.LayerRule, dict or None
        How each layer's rate is set: ``"singh"``, ``"layca"``, ``"lars"``, ``"lamb"``,
        ``"relative"``, ``"hyperball"``, ``"brake"``, ``"curvature"``, ``"backmatching"``,
        ``"rated"``, or a rule with its hyper-parameters, in configuration files a mapping with its
        name: ``{"name": "lamb", "clip": 10.0}``. None: the torch.optim optimizer of the same name.
    layers : str or callable
        What forms a layer: ``"tensor"`` (each parameter), ``"module"`` (the parameters of a module;
        needs named parameters) or ``(name, param) -> key``.
    adapt : str, callable or None
        What the rule governs: ``"all"``, ``"kernels"`` (two or more dimensions larger than 1: no
        class token of shape (1, 1, D)), ``"none"`` or ``(name, param) -> bool``. None: the rule's
        own choice (all for singh, else kernels). The other parameters take the plain step.
    plain_lr : float or None
        Rate of the plain step, where lr is what it was when the group was added (the group key
        ``reference_lr``); schedulers, which write lr, scale it along: ``plain_lr * lr /
        reference_lr``. It goes for every parameter that the rule does not govern, those of a group
        with ``rule=None`` included, unless that group has an lr of its own, and for a layer of
        zeros under a rule that measures steps by the weights. None: lr.
    backend : str
        ``"auto"`` takes the fastest that supports the case; a name that does not support it raises.
    on_nonfinite : str or None
        ``"skip"``: a layer whose gradient holds NaN or inf keeps its weights and its step count,
        the other layers go on (the default with a rule). ``"propagate"``: torch's way (the default
        without).
    max_grad_norm : float or None
        Clip gradients inside the step, as `torch.nn.utils.clip_grad_norm_` before it: times
        ``min(1, max_grad_norm / (n + 1e-6))``, n being the norm of all gradients of the groups that
        have it, found at ``optimizer.grad_norm`` after the step, on the device. None or 0: no
        clipping. A layer that is skipped counts nothing in it, nor does what ``others="freeze"``
        keeps. ``.grad`` is left as it is. Costs another pass over the gradients, under sharding
        another message.
    corrected_decay : bool
        Decoupled weight decay in proportion to lr, ``weight_decay * lr / reference_lr`` (AdamC,
        arXiv:2506.02285): the norm at which decay and steps balance then stays where it is while a
        schedule lowers lr. ``reference_lr`` is the lr that the group was added with, or a group
        key. lr must be a number or on the CPU.
    precision : str or None
        How bfloat16 and float16 weights keep what rounding to nearest would lose (a step of less
        than half a unit in the last place); others step as without it. ``"master"``: a float32 copy
        takes the steps, the weight is its rounding. ``"kahan"``: a second number of the weight's
        dtype holds what the first has lost, in float16 nothing below 2^-24. ``"stochastic"``: the
        weight is rounded up or down with probability in proportion, bfloat16 only, by bits that
        follow from a seed in the state: the group key ``seed``, or 0. None: rounded to nearest. Of
        memory they take 4, 2, 0 and 0 bytes a weight; a pass over the weights reads 6, 4, 2 and 2,
        a step writes as many. See `layerlr.precision`.
    state_dtype : str
        ``"float32"``; ``"bfloat16"``: 2 bytes a number instead of 4; ``"8bit"``: 1 byte and a
        sixteenth, for what the rule governs (without a rule: kernels) with two or more dimensions
        and 4,096 weights or more, in blocks with a scale each: of the largest number up to 64, and
        from 16, that divides a row, the product of all dimensions but the first. The rest stays
        float32. State converts where the key is set anew. See `layerlr.codes`.

    Notes
    -----
    ``foreach`` and ``fused`` are checked as torch does and never change the numbers; with
    ``fused=True`` the step divides a `torch.amp.GradScaler`'s scale out itself, without an extra
    pass, and does nothing at all where an overflow was found, without asking the device. State and
    arithmetic are float32 for parameters of lower precision. The param-group keys ``split``,
    ``lr_factor``, ``reference_lr`` and ``seed`` are described at `layerlr.options.GroupOptions`.
    """

    rule: Annotated[Rule, Option(None)]
    layers: Annotated[str | LayerKey, Option("tensor", _check_layers)]
    adapt: Annotated[str | Adapt | None, Option(None, _check_adapt)]
    plain_lr: Annotated[float | None, Option(None, plain_lr.settle)]
    corrected_decay: Annotated[bool, Option(False)]
    backend: Annotated[str, Option("auto")]
    on_nonfinite: Annotated[OnNonfinite, Option(None, _check_on_nonfinite)]
    max_grad_norm: Annotated[float | None, Option(None, _check_max_grad_norm)]
    precision: Annotated[Precision, Option(None, _check_precision)]
    state_dtype: Annotated[StateDtype, Option("float32", _check_state_dtype)]


class GroupOptions(TypedDict, total=False):
    """Keys that param groups alone have; ``split`` and ``lr_factor`` are checked with the layers.

    split : int or list of int
        Blocks of dim 0 that are layers of their own: a number of equal blocks, or their sizes.
    lr_factor : float or list of float
        A factor on lr: a number for all parameters of the group, or one for each layer.
    reference_lr : float
        The lr at which ``plain_lr`` is meant, which the optimizer remembers; a state dict has it.
    seed : int or None
        Seed of stochastic rounding, read when the state is made; the same one in every process,
        as copies of a model would part otherwise. None: 0.
    """

    split: Annotated[int | Sequence[int] | None, Option(None)]
    lr_factor: Annotated[float | Sequence[float], Option(1.0)]
    reference_lr: Annotated[float, Option(None)]
    seed: Annotated[int | None, Option(None, _check_seed)]


def _read(table: type) -> dict[str, Option]:
    hints = get_type_hints(table, include_extras=True)
    return {name: get_args(hint)[1] for name, hint in hints.items()}


OPTIONS = _read(LayerwiseOptions)
GROUP_ONLY = _read(GroupOptions)


# -- what follows from it --------------------------------------------------------------------------


def refuse_unknown(owner: type, given: Mapping[str, Any]) -> None:
    """Refuse a constructor's argument that is none, as Python does, saying where it belongs."""
    name = next((name for name in given if name not in OPTIONS), None)
    if name is not None:
        remedy = unknown_arguments.remedy(owner, name, given[name], GROUP_ONLY)
        raise TypeError(
            f"{owner.__name__}.__init__() got an unexpected keyword argument {name!r}{remedy}"
        )


def complete(owner: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options, of which some are given to a constructor.

    Raises
    ------
    TypeError
        For one that is none.
    ValueError
        For an unknown backend or rule.
    """
    refuse_unknown(owner, given)
    options = {name: given.get(name, option.default) for name, option in OPTIONS.items()}
    backends.validate(options["backend"])
    options["rule"] = rules.resolve(options["rule"])
    return options


def check(group: Group, index: int) -> None:
    """Refuse a param group's options, naming the key, and the parameter where it is about one.

    Raises
    ------
    ValueError
        Where a value is not one of those that are documented.
    """
    for option in (*OPTIONS.values(), *GROUP_ONLY.values()):
        if option.check is not None:
            option.check(group, index)


def documented(cls: type) -> type:
    """Write the options into the docstring and the signature of a class that takes them."""
    _, _, options = (LayerwiseOptions.__doc__ or "").partition("\n\n")
    own, heading, examples = (cls.__doc__ or "").rstrip().partition("\n    Examples\n")
    cls.__doc__ = own.rstrip() + "\n" + options.rstrip() + "\n" + heading + examples + "\n"
    init: Any = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(init)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    hints = get_type_hints(LayerwiseOptions)
    more = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=o.default, annotation=hints[name]
        )
        for name, o in OPTIONS.items()
    ]
    init.__signature__ = signature.replace(parameters=[*named, *more])
    return cls
