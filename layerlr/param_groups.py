"""What to write into param groups: what a rule governs and what decays; rates by depth."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

from torch import nn

from . import checks
from .conditions import holds
from .layers import is_kernel

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm)  # whose weights may be matrices; others have vectors

Patterns = str | Iterable[str]


def param_groups(
    model: nn.Module,
    *,
    governed: Patterns = (),
    plain: Patterns = (),
    head: Patterns | None = None,
    decay: Patterns = (),
    no_decay: Patterns = (),
) -> list[dict[str, Any]]:
    """Sort a model's parameters: hidden matrices under the rule, the others plain.

    Plain are

    - what is no matrix: parameters with fewer than two dimensions larger than 1;
    - biases: parameters with "bias" in the last part of their name;
    - embeddings: parameters of an `nn.Embedding` or `nn.EmbeddingBag`, and what is tied to them;
    - norms: parameters of an `nn.LayerNorm` or `nn.RMSNorm`;
    - heads: see ``head``;
    - what the model's own ``no_weight_decay()`` names, where it has one (timm: position embeddings,
      class tokens).

    All but these are under the rule, kernels of convolutions included. Weight decay, where the
    optimizer has it, is on matrices: hidden ones, embeddings and heads; the others have none.
    Position embeddings that are bare parameters are matrices as any other: name them in ``plain``.
    Layers lie within one group: under ``layers="module"`` a bias that is sorted out is not in its
    module's layer (``governed`` and ``decay`` bring it there).

    Parameters
    ----------
    model : nn.Module
    governed, plain : str or iterable of str
        Patterns (`fnmatch`: ``*``, ``?``) of parameters to put under the rule, or to keep from it.
        A pattern matches the name of a parameter, or of a module, for all that is in it.
    head : str, iterable of str or None
        Patterns of the output layers; ``()`` for none. None: what the model says itself,
        ``get_output_embeddings()`` as in transformers or ``get_classifier()`` as in timm; else the
        last `nn.Linear` of ``model.modules()``. A model without a head has its last hidden
        layer there: look at `describe`.
    decay, no_decay : str or iterable of str
        Patterns of parameters to decay, or not to decay, whatever they are.

    Returns
    -------
    list of dict
        Param groups with names: first what the rule governs (``adapt="all"``), then the plain ones
        (``adapt="none"``), those without weight decay apart (``weight_decay=0``). A parameter that
        has several names is in one, under its first; any of them matches. Frozen ones are in.

    Raises
    ------
    TypeError
        For what is no model.
    ValueError
        For what is no pattern, one without a match, a parameter that is to be both, one of a lazy
        module that has not run, a model of which nothing is left under the rule.

    Examples
    --------
    >>> groups = layerlr.param_groups(model, plain="pos_embed")
    >>> opt = layerlr.AdamW(groups, lr=0.02, plain_lr=4e-3, weight_decay=0.1, rule="lamb")
    >>> layerlr.describe(opt)  # what is adapted and what plain, at which lr and decay
    """
    checks.module("param_groups", model)
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps: names are its own
    params: dict[int, nn.Parameter] = {}
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        checks.lazy(name, p)
        params[id(p)] = p
        names.setdefault(id(p), []).append(name)
    said = {key for pattern in _patterns(_said_by(model)) for key in _found(names, pattern)}
    embeddings, norms = (
        _of_modules(m for m in model.modules() if isinstance(m, kind))
        for kind in (_EMBEDDINGS, _NORMS)
    )
    heads = _of_modules(_heads(model)) if head is None else _matching(names, "head", head)
    to_govern, to_plain = (
        _matching(names, key, given) for key, given in (("governed", governed), ("plain", plain))
    )
    to_decay, not_to_decay = (
        _matching(names, key, given) for key, given in (("decay", decay), ("no_decay", no_decay))
    )
    _disjoint(names, "governed", to_govern, "plain", to_plain)
    _disjoint(names, "decay", to_decay, "no_decay", not_to_decay)
    groups: dict[tuple[bool, bool], dict[str, Any]] = {
        (ruled, decays): {"params": [], "param_names": [], "adapt": "all" if ruled else "none"}
        for ruled in (True, False)
        for decays in (True, False)
    }
    for key, p in params.items():
        bias = any("bias" in name.rpartition(".")[2] for name in names[key])
        matrix = is_kernel(p) and not bias and key not in said | norms
        ruled = key in to_govern or (matrix and key not in to_plain | embeddings | heads)
        decays = key in to_decay or (matrix and key not in not_to_decay)
        groups[ruled, decays]["params"].append(p)
        groups[ruled, decays]["param_names"].append(names[key][0])
    if not any(groups[True, decays]["params"] for decays in (True, False)):
        raise ValueError(
            f"param_groups leaves nothing of {type(model).__name__} under the rule: name what it "
            "should govern (governed='...'), or pass model.named_parameters() to the optimizer"
        )
    for ruled in (True, False):
        groups[ruled, False]["weight_decay"] = 0.0
    return [group for group in groups.values() if group["params"]]


def _of_modules(modules: Iterable[nn.Module]) -> set[int]:
    return {id(p) for module in modules for p in module.parameters()}


def _heads(model: nn.Module) -> list[nn.Module]:
    """The output layers, as the model says, or else its last linear layer."""
    for ask in ("get_output_embeddings", "get_classifier"):
        answer: Any = getattr(model, ask, None)
        found = answer() if callable(answer) else None
        found = found if isinstance(found, (tuple, list)) else [found]
        modules = [module for module in found if isinstance(module, nn.Module)]
        if modules:
            return modules
    linear: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return linear[-1:]


def _said_by(model: nn.Module) -> Patterns:
    """What the model says should not decay."""
    answer: Any = getattr(model, "no_weight_decay", None)
    return (answer() or ()) if callable(answer) else ()


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def _patterns(given: Patterns) -> list[Any]:
    one = isinstance(given, str) or not isinstance(given, Iterable)
    return [given] if one else list(given)


def _matching(names: dict[int, list[str]], argument: str, given: Patterns) -> set[int]:
    found: set[int] = set()
    patterns = _patterns(given)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"Invalid {argument}: {given!r}, wanted a pattern, or several")
    for pattern in patterns:
        keys = _found(names, pattern)
        if not keys:
            raise ValueError(
                f"{argument}: {pattern!r} matches no parameter or module; patterns are whole names "
                f"with * and ?, such as {'*.weight'!r}"
            )
        found |= keys
    return found


def _found(names: dict[int, list[str]], pattern: str) -> set[int]:
    return {key for key, of_one in names.items() if any(_matches(n, pattern) for n in of_one)}


def _disjoint(
    names: dict[int, list[str]], one: str, ones: set[int], other: str, others: set[int]
) -> None:
    for key in ones & others:
        raise ValueError(f"parameter {names[key][0]!r} matches both {one} and {other}")


def depth_multipliers(n_layers: int, alpha: float) -> list[float]:
    """Layer-wise rates by depth, for the param-group key ``lr_factor``.

    ``(1-alpha)^(5*(L-1-l)/(L-1))`` for alpha > 0, which favours the last layers, and
    ``(1+alpha)^(5*l/(L-1))`` for alpha <= 0, which favours the first; l = 0..L-1 in forward order.

    Parameters
    ----------
    n_layers
        L >= 1.
    alpha
        In (-1, 1); 0 gives all ones.

    Raises
    ------
    ValueError
        For values out of range.

    Examples
    --------
    >>> depth_multipliers(3, 0.5)
    [0.03125, 0.1767766952966369, 1.0]

    References
    ----------
    Carbonnelle, De Vleeschouwer, arXiv:1806.01603, and the authors' code.
    """
    if not holds(lambda x: x >= 1 and x == int(x), n_layers):
        raise ValueError(f"Invalid n_layers: {n_layers!r}, wanted a whole number, at least 1")
    n_layers = int(n_layers)
    if not holds(lambda x: -1.0 < x < 1.0, alpha):
        raise ValueError(f"Invalid alpha: {alpha!r}, wanted a number in (-1, 1)")
    last = max(n_layers - 1, 1)
    if alpha > 0:
        return [(1.0 - alpha) ** (5.0 * (n_layers - 1 - i) / last) for i in range(n_layers)]
    return [(1.0 + alpha) ** (5.0 * i / last) for i in range(n_layers)]
