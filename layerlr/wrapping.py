"""A rule on any optimizer: the base takes its step, the rule says what of it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import base_lr, rules, stepping, taken, wrapped_checks, wrapped_state
from .backends import StepConfig
from .backends.config import PLAIN
from .directions import DIRECTIONS, Direction
from .gradient_factors import scaled_gradients
from .group_plans import GroupPlans
from .layers import Adapt, LayerKey
from .numbers import put_lr
from .optimizer import LayerwiseOptimizer
from .rules import Rule
from .taken import LEAST
from .wrapped_state import SHARED, State

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
        step. Param groups may have keys ``rule``, ``layers``, ``adapt``, ``split``, ``lr_factor``
        (refused under a gradient rule: a base has one lr for a group).

    Returns
    -------
    Wrapped
        A `torch.optim.Optimizer`, whose ``base`` is the optimizer.

    Raises
    ------
    TypeError
        For what is no optimizer, for one that steps several times with its closure (L-BFGS), has
        state dicts of another form (Lookahead), or has an optimizer of ours inside.
    ValueError
        For a rule that looks at the model, ``others="freeze"``, bounds of LAMB on a base without
        lr, a missing lr, or one of zero.

    Notes
    -----
    What the base's own numbers mean:

    =================  ===============================================  ==========================
    the base's         under a rule that sets the step's length         under the others
    =================  ===============================================  ==========================
    lr                 the rate of what the rule does not govern, in    the wrapper's lr, which is
                       groups without a rule too; it follows the        written into the base
                       wrapper's lr by its ratio
    weight decay       part of u; Layca projects it out                 part of u, or taken beside
                                                                        the factor on g
    clipping           before the step, as without a wrapper            the same
    =================  ===============================================  ==========================

    Bounds of LAMB (``min_ratio``, ``max_ratio``, ``trust_clip``) are on the ratio to what the
    base's step would be at an lr of 1: its step over its lr.

    Non-finite gradients are not skipped: the base's step takes them, as without a wrapper.

    Layers that start at zero take the base's own steps until they reach their radius.

    u is the difference of stored weights, right to an ulp of them: to ``eps*|w|/|u|`` of its
    length. So give the base its usual lr, not a tiny one, above all in 16 bits, where steps of less
    than half an ulp are lost before the rule sees them. An optimizer of this package inside equals
    the built-in class to that bound under update rules. Under gradient rules second moments see
    ``f*g``, where the built-in classes keep g in them and scale the step: on a base that divides by
    the gradient's size (Adam, Lion, Muon) f cancels, and such a rule does hardly anything.

    Memory: one copy of the governed weights during the step (under a gradient rule of the governed
    gradients). Time: the base's, one copy, and two passes: 16 bytes a float32 parameter to copy and
    measure, 12 to apply. Under sharding one message a process group; two where groups have rules of
    both orders.

    Steps cannot be captured in CUDA graphs, nor taken inside backward.

    The base's state is at ``optimizer.base.state``. State dicts hold it beside the wrapper's, under
    keys that begin with ``base.``; so does `torch.distributed.checkpoint`. With its
    ``flatten_optimizer_state_dict=True`` it brings back no key that ``optimizer.state`` and the
    param groups do not have themselves, so the base's would be lost: loading refuses such a dict.

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
        wrapped_checks.base(base, LayerwiseOptimizer)
        self.base = base
        self._joined = False  # the base has the groups already
        groups = []
        for theirs in base.param_groups:
            keys = SHARED if isinstance(base, LayerwiseOptimizer) else (*SHARED, *_OURS)
            groups.append({key: theirs[key] for key in keys if key in theirs})
        defaults = dict[str, Any](lr=lr, weight_decay=0.0, maximize=False, differentiable=False)
        super().__init__(
            groups,
            defaults,
            dict(rule=rule, layers=layers, adapt=adapt, backend=backend, on_nonfinite="propagate"),
        )
        self._joined = True

    # -- what the base class asks --------------------------------------------------------------

    def direction(self, group: dict[str, Any]) -> Direction:
        return DIRECTIONS["sgd"]

    def plain_ratio(self, group: dict[str, Any]) -> float | None:
        return None  # such parameters take the base's step, and that is all

    def rule(self, group: dict[str, Any]) -> rules.LayerRule | None:
        found = super().rule(group)
        index = next(k for k, ours in enumerate(self.param_groups) if ours is group)
        wrapped_checks.rule(found, self.base.param_groups[index])
        if found is not None and found.sets_length and group.get("reference_lr") is None:
            raise ValueError(
                f"rule {found.name!r} sets the length of the step, and lr of param group {index} "
                "is the base's: wrap the base again, with this rule and its lr"
            )
        return found

    def numbers(self, group: dict[str, Any]) -> StepConfig:
        """The numbers of the rule's half of a step; those of the base are its own."""
        rule = group["rule"]
        if rule.order == "gradient":
            wrapped_checks.factor(group)
            config = StepConfig()
            put_lr(config, self, group["lr"])
            return config
        lr = group["lr"]
        config = taken.config() if rule.sets_length else taken.config(lr)
        put_lr(config, self, lr)
        if rule.sets_length:  # for layers that grow: the step as it was taken
            config.put(PLAIN, 1.0 / (lr.clamp(min=LEAST) if isinstance(lr, Tensor) else lr or 1.0))
        return config

    # -- param groups --------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base and to the wrapper; one that is refused leaves nothing behind.

        Its ``lr`` is that of the rule where the rule has one of its own, else the base's.
        """
        if not self._joined:
            self._add(param_group, self.base.param_groups[len(self.param_groups)])
            return
        theirs = {key: value for key, value in param_group.items() if key not in _OURS}
        own = base_lr.has_own(rules.resolve(param_group.get("rule", self.defaults["rule"])))
        if own:
            theirs.pop("lr", None)
        self.base.add_param_group(theirs)
        added = self.base.param_groups[-1]
        ours = {key: param_group[key] for key in _OURS if key in param_group}
        ours |= {key: added[key] for key in SHARED if key in added}
        beside_own = base_lr.has_own(rules.resolve(self.defaults["rule"]))
        if "lr" in param_group and (own or not beside_own):
            ours["lr"] = param_group["lr"]
        try:
            self._add(ours, added)
        except Exception:
            self.base.param_groups.pop()
            for p in added["params"]:
                self.base.state.pop(p, None)
            raise

    def _add(self, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        base_lr.settle(ours, theirs, self.defaults)
        super().add_param_group(ours)

    # -- stepping ------------------------------------------------------------------------------

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Perform one step; ``closure`` re-evaluates the model and returns the loss."""
        return super().step(closure)

    @torch.no_grad()
    def eager_step(self) -> None:
        """The base's step between the two halves of the rule's."""
        wrapped_checks.capture(self.param_groups)
        wrapped_checks.groups(self.param_groups, self.base)
        if wrapped_checks.scheduled(self.base):
            self.plans.say_once("schedule", wrapped_checks.SCHEDULED)
        every = self.plans.every()
        for of_group in every:
            if _order(of_group):
                self.plans.config(of_group)  # what is refused is before the base steps
        before = taken.copies(p for p in _under_update_rules(every) if p.grad is not None)
        with taken.put_back(before):
            with (
                base_lr.written(self.param_groups, self.base.param_groups),
                scaled_gradients(self._prepared("gradient", every), self.numbers),
            ):
                self.base.step()
            with taken.as_gradients(before):
                plans = self._prepared("update", every) if before else []
                stepping.step([(plan, self.plans.config(p)) for p in plans for plan in p.plans], {})

    def _prepared(self, order: str, among: list[GroupPlans]) -> list[GroupPlans]:
        return self._graphs.prepared(lambda plans: _order(plans) == order, among)

    # -- persistence ---------------------------------------------------------------------------

    @property
    def state(self) -> State:  # type: ignore[override]
        """The rule's memory and step counts; the base's state is at ``base.state``."""
        found = self.__dict__["state"]
        if not isinstance(found, State):  # torch's own, of a constructor or a state dict
            found = self.__dict__["state"] = State(self.base, found)
        return found

    @state.setter
    def state(self, value: dict[Any, Any]) -> None:
        self.__dict__["state"] = value

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the base's state and hyper-parameters under keys of ``base.``."""
        return wrapped_state.join(super().state_dict(), self.base.state_dict())

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, into the base too; if that fails, nothing has changed."""
        ours, theirs = wrapped_state.split(state_dict)
        before = self.base.state, self.base.param_groups
        self.base.load_state_dict(theirs)
        try:
            super().load_state_dict(ours)
        except Exception:
            self.base.state, self.base.param_groups = before
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "base": self.base, "_joined": True}


def _under_update_rules(plans: list[GroupPlans]) -> list[Tensor]:
    tables = [t for of_group in plans if _order(of_group) == "update" for t in of_group.tables]
    return [p for of_table in tables for p in of_table.table.params]


def _order(plans: GroupPlans) -> str | None:
    rule = plans.group["rule"]
    return None if rule is None else str(rule.order)
