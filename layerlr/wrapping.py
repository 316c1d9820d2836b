"""A rule on any optimizer: the base takes its step, the rule says what of it stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import rules, stepping, wrapped_state
from .backends import StepConfig
from .backends.config import L2, PLAIN, TAKEN
from .directions import DIRECTIONS, Direction
from .gradient_factors import scaled_gradients
from .layers import Adapt, LayerKey
from .numbers import put_lr
from .optimizer import LayerwiseOptimizer
from .plans import GroupPlans
from .rules import LayerRule, Rule
from .wrapped_state import SHARED

#: keys of a group that are the wrapper's alone
_OURS = ("rule", "layers", "adapt", "split", "lr_factor")


def wrap(
    optimizer: Optimizer,
    rule: Rule,
    *,
    lr: float | Tensor | None = None,
    layers: Literal["tensor", "module"] | LayerKey = "tensor",
    adapt: Adapt | str | None = None,
    backend: str = "auto",
) -> Wrapped:
    """Put a layer rule on any optimizer.

    Update rules: the base takes its step from v to v - u, and the rule sets what is applied::

        w <- a*v + b*u,  a and b from the sums over v and u of each layer

    Gradient rules: the base sees ``f*g``, f being the rule's factor; ``.grad`` is left as it was.

    Parameters
    ----------
    optimizer
        The base: torch.optim's, one of this package, or another's. Its param groups are taken over,
        parameter by parameter; it must not be stepped beside the wrapper.
    rule
        A rule or its name; see `layerlr.rules`. Those that look at the model need a direction of
        this package.
    lr
        Under a rule that sets the length of the step (Layca, Hyperball, LAMB and relative steps
        without bounds): the rule's, an angle or a ratio; must be given. Under the others: the
        base's (None: the one that it has). Schedulers work on the wrapper.
    layers, adapt, backend
        As for every optimizer of this package; what the rule does not govern takes the base's own
        step. Param groups may have keys ``rule``, ``layers``, ``adapt``, ``split``, ``lr_factor``.

    Returns
    -------
    Wrapped
        A `torch.optim.Optimizer`, whose ``base`` is the optimizer.

    Raises
    ------
    TypeError
        For what is no optimizer.
    ValueError
        For a rule that looks at the model, ``others="freeze"``, a missing lr, or one of zero.

    Notes
    -----
    What the base's own numbers mean:

    =================  ===============================================  ==========================
    the base's         under a rule that sets the step's length         under the others
    =================  ===============================================  ==========================
    lr                 the rate of what the rule does not govern; it    the wrapper's lr, which is
                       follows the wrapper's lr by its ratio            written into the base
    weight decay       part of u; Layca projects it out                 part of u, or taken beside
                                                                        the factor on g
    clipping           before the step, as without a wrapper            the same
    =================  ===============================================  ==========================

    Layers that start at zero take the base's own steps until they reach their radius.

    Memory: one copy of the governed weights during the step (under a gradient rule of the governed
    gradients), whatever the base. Time: the base's, one copy, and two passes: 24 bytes a float32
    parameter to copy and measure, 12 to apply. Under sharding one message a process group.

    State dicts hold the base's state beside the wrapper's, under keys that begin with ``base.``.

    Examples
    --------
    >>> muon = torch.optim.Muon(matrices, lr=0.02)
    >>> optimizer = layerlr.wrap(muon, "hyperball", lr=0.01)

    References
    ----------
    Singh et al. 2015 put their rule "on top of any optimization method with a global learning
    rate"; Layca is defined on "the step of the optimizer" (arXiv:1806.01603, algorithm 1).
    """
    return Wrapped(optimizer, rule, lr=lr, layers=layers, adapt=adapt, backend=backend)


class Wrapped(LayerwiseOptimizer):
    """An optimizer with a rule on it; see `wrap`."""

    def __init__(
        self,
        base: Optimizer,
        rule: Rule,
        *,
        lr: float | Tensor | None,
        layers: Literal["tensor", "module"] | LayerKey,
        adapt: Adapt | str | None,
        backend: str,
    ) -> None:
        if not isinstance(base, Optimizer):
            raise TypeError(f"wrap wants a torch.optim.Optimizer, got {type(base).__name__}")
        self.base = base
        self._joins = False  # the base has the groups already
        groups = []
        for theirs in base.param_groups:
            taken = SHARED if isinstance(base, LayerwiseOptimizer) else (*SHARED, *_OURS)
            groups.append({key: theirs[key] for key in taken if key in theirs})
        defaults = dict[str, Any](lr=lr, weight_decay=0.0, maximize=False, differentiable=False)
        super().__init__(
            groups,
            defaults,
            dict(rule=rule, layers=layers, adapt=adapt, backend=backend, on_nonfinite="propagate"),
        )
        self._joins = True

    # -- what the base class asks --------------------------------------------------------------

    def direction(self, group: dict[str, Any]) -> Direction:
        return DIRECTIONS["sgd"]

    def plain_ratio(self, group: dict[str, Any]) -> float | None:
        return None  # such parameters take the base's step, and that is all

    def numbers(self, group: dict[str, Any]) -> StepConfig:
        """The weights are w = v - u and the gradient is v: v - w, the step, is L2 decay of -1."""
        config, rule = StepConfig(), group["rule"]
        lr = group["lr"] if rule.sets_length or rule.order == "gradient" else 1.0
        put_lr(config, self, lr)
        if rule.order == "update":
            config.values[L2] = -1.0
            config.values[TAKEN] = 1.0
            # for layers that grow: the step as it was taken
            config.put(PLAIN, 1.0 / (lr.clamp(min=1e-30) if isinstance(lr, Tensor) else lr or 1.0))
        return config

    # -- param groups --------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base and to the wrapper; one that is refused leaves nothing behind."""
        if not getattr(self, "_joins", True):
            self._add(param_group, self.base.param_groups[len(self.param_groups)])
            return
        theirs = {key: value for key, value in param_group.items() if key not in _OURS}
        rule = rules.resolve(param_group.get("rule", self.defaults["rule"]))
        own_lr = rule is not None and rule.sets_length
        if own_lr:
            theirs.pop("lr", None)
        self.base.add_param_group(theirs)
        added = self.base.param_groups[-1]
        ours = {key: param_group[key] for key in _OURS if key in param_group}
        ours |= {key: added[key] for key in SHARED if key in added}
        if own_lr and "lr" in param_group:
            ours["lr"] = param_group["lr"]
        try:
            self._add(ours, added)
        except Exception:
            self.base.param_groups.pop()
            raise

    def _add(self, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        rule = rules.resolve(ours.get("rule", self.defaults["rule"]))
        _check_rule(rule)
        lr = ours.get("lr", self.defaults["lr"])
        if rule is not None and rule.sets_length:
            if lr is None:
                raise ValueError(
                    f"rule {rule.name!r} sets the length of the step: give lr, the angle or the "
                    "ratio that it turns or moves layers by"
                )
            reference = float(lr)
            if not reference > 0.0:
                raise ValueError(
                    f"Invalid lr: {reference}, the base's rate follows lr by its ratio: give a "
                    "nonzero lr and let a scheduler warm it up"
                )
            ours["reference_lr"] = reference
        elif lr is None:
            lr = theirs.get("lr")
        ours["lr"] = 1.0 if lr is None else lr
        super().add_param_group(ours)

    # -- stepping ------------------------------------------------------------------------------

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Perform one step; ``closure`` re-evaluates the model and returns the loss."""
        return super().step(closure)

    @torch.no_grad()
    def eager_step(self) -> None:
        """The base's step between the two halves of the rule's."""
        with self._rates_of_the_base(), scaled_gradients(self._prepared("gradient"), self.numbers):
            before = self.copies()
            self.base.step()
        with self.taken(before) as plans:
            stepping.step([(plan, self.plans.config(p)) for p in plans for plan in p.plans], {})

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """What the base is about to change of the weights under update rules, and copies of it."""
        found = []
        for plans in self.plans.every():
            if _order(plans) == "update":
                for table in plans.tables:
                    moving = (p for p in table.table.params if p.grad is not None)
                    found += [(p, p.detach().clone()) for p in moving]
        return found

    @contextmanager
    def taken(self, before: list[tuple[Tensor, Tensor]]) -> Iterator[list[GroupPlans]]:
        """The plans of update rules, which see the weights before the step as gradients."""
        gradients = [(p, p.grad) for p, _ in before]
        try:
            for p, v in before:
                p.grad = v
            yield self._prepared("update") if before else []
        finally:
            for p, g in gradients:
                p.grad = g

    def _prepared(self, order: str) -> list[GroupPlans]:
        return self._graphs.prepared(lambda plans: _order(plans) == order)

    @contextmanager
    def _rates_of_the_base(self) -> Iterator[None]:
        """The base's lr for a step: in the ratio of ours to what it was, or ours."""
        own = []
        for ours, theirs in zip(self.param_groups, self.base.param_groups, strict=True):
            if theirs.get("lr") is None:
                continue
            rule = ours["rule"]
            if rule is None or not rule.sets_length:
                theirs["lr"] = ours["lr"]
                continue
            own.append((theirs, theirs["lr"]))
            ratio = ours["lr"] / ours["reference_lr"]
            if not isinstance(ratio, float) or ratio != 1.0:
                theirs["lr"] = theirs["lr"] * ratio
        try:
            yield
        finally:
            for theirs, lr in own:
                theirs["lr"] = lr

    # -- persistence ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the base's state and hyper-parameters under keys of ``base.``."""
        return wrapped_state.join(super().state_dict(), self.base.state_dict())

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, into the base too."""
        ours, theirs = wrapped_state.split(state_dict)
        self.base.load_state_dict(theirs)
        super().load_state_dict(ours)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "base": self.base, "_joins": self._joins}


def _order(plans: GroupPlans) -> str | None:
    rule = plans.group["rule"]
    return None if rule is None else str(rule.order)


def _check_rule(rule: LayerRule | None) -> None:
    if isinstance(rule, rules.Estimated):
        raise ValueError(
            f"rule {rule.name!r} finds its rates from directions of this package and cannot be put "
            "on another optimizer: use layerlr.SGD, layerlr.AdamW and the like"
        )
    if rule is not None and rule.freezes:
        raise ValueError(
            f"{rule!r} cannot keep the base from moving what it does not govern: give the base no "
            "such parameters, or use others='plain'"
        )
