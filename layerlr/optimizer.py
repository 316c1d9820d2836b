"""The optimizer behind every class: param groups, the step, the state dict."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from . import checks, compiled, hooks, names, numbers, options, rules, statistics, stepping
from ._C import GradMode
from .backends import StepConfig
from .directions import Direction
from .estimation import Estimation
from .graphs import CapturedSteps, check_capturable
from .options import LayerwiseOptions
from .plain_lr import ratio
from .plans import PlanCache
from .state_dicts import pack_groups, restore_state, unpack_groups


class LayerwiseOptimizer(Optimizer):
    """A direction and a layer rule; subclasses name the direction.

    Everything that torch.optim promises holds: param groups, closures, hooks, schedulers, state
    dicts. `layerlr.options` has the keyword arguments and param-group keys of our own.

    Under ``torch.compile`` a step is one op without a graph break that reads lr, weight decay,
    momentum, betas and the like when it runs: schedules do not recompile. Sharded parameters and
    ``differentiable=True`` take the step outside of the graph. CUDA graphs: see `refresh`.
    """

    profile_hook_step = staticmethod(hooks.around)  # type: ignore[assignment]
    _grad_norm: Tensor | None = None

    @torch._disable_dynamo
    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], layerwise: LayerwiseOptions
    ) -> None:
        given = options.complete(type(self), layerwise)
        self.backend: str = given.pop("backend")
        self._equip()
        defaults |= given
        checks.flags(defaults)
        super().__init__(params, defaults)
        self.plans.check_use("rule" not in layerwise)

    def _equip(self) -> None:
        """Give the optimizer what copies and pickles of it do not take along."""
        self.plans = PlanCache(self)
        self.handle = compiled.handle_of(self)
        self._graphs = CapturedSteps(self.plans)
        self._estimation = Estimation(self.plans, self._graphs)

    # -- what a subclass says ------------------------------------------------------------------

    def direction(self, group: dict[str, Any]) -> Direction:
        """Direction of a param group."""
        raise NotImplementedError

    def decoupled(self, group: dict[str, Any]) -> bool:
        """Whether a param group's weight decay is decoupled from its gradients."""
        return False

    def rule(self, group: dict[str, Any]) -> rules.LayerRule | None:
        """The rule of a param group, from what it was given."""
        return checks.rule(rules.resolve(group["rule"]), type(self))

    def numbers(self, group: dict[str, Any]) -> StepConfig:
        """The numbers of a group's step, but for the direction's and the rule's own."""
        return numbers.of_group(self, group)

    def plain_ratio(self, group: dict[str, Any]) -> float | None:
        """Factor on lr of what the rule does not govern; None: such parameters are left alone."""
        return ratio(group)

    # -- param groups --------------------------------------------------------------------------

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and create its state; a group that is refused leaves nothing behind."""
        own = list(param_group) if isinstance(param_group, dict) else []
        if self._estimation.replay is not None and "params" in own:
            names.join(param_group, self.param_groups, self._estimation.replay.model)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            # a copy: torch.compile watches one of several ways to an object, not each group's
            group["rule"] = copy.copy(self.rule(group))
            if group["rule"] is None and "lr" in own and "plain_lr" not in own:
                group["plain_lr"] = None  # its lr is a plain rate already
            self.plans.take_as_said({"reference_lr"} & {*own})
            self.plans.rebuild(len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            for p in group["params"]:
                self.state.pop(p, None)
            raise

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves its scale and overflows to `step`, as by ``fused=True``."""
        return self._estimation.differentiates() or all(g.get("fused") for g in self.param_groups)

    # -- stepping ------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Perform one step; ``closure`` re-evaluates the model and returns the loss.

        Every gradient is checked before any weight changes.

        Raises
        ------
        RuntimeError
            For a gradient that cannot be used, naming its parameter.
        """
        loss, start = None, []
        compiling = torch.compiler.is_compiling()
        # dynamo would make constants of all numbers in param_groups
        groups = [plans.group for plans in self.plans.groups] if compiling else self.param_groups
        estimated = any(rules.is_estimated(group["rule"]) for group in groups)
        if closure is not None:
            if estimated:
                start = self._estimation.start()
            with torch.enable_grad():
                loss = closure()
        if not compiling:  # dynamo sets the flag as it likes
            check_capturable(self.param_groups)
        if estimated:
            self._estimation.estimate(closure, start)
        if compiling:
            compiled.step(self)
        else:
            self.eager_step()
        return loss

    def eager_step(self) -> None:
        """The step itself, without closure and hooks."""
        with GradMode(self.defaults["differentiable"]):
            steps: list[stepping.Step] = []
            bounds: dict[int, float] = {}
            for plans in self._graphs.prepared():
                config = self.plans.config(plans)
                bound = options.max_grad_norm(plans.group)
                for plan in plans.plans:
                    if bound is not None:
                        bounds[len(steps)] = bound
                    steps.append((plan, config))
            self._grad_norm = stepping.step(steps, bounds)

    # -- CUDA graphs -----------------------------------------------------------------------------

    def refresh(self) -> None:
        """Bring hyper-parameters that have changed to the device, where captured steps read them.

        A CUDA graph of a step has no numbers of its own. Outside of captures ``step()`` brings lr,
        weight decay, momentum, betas and the like along; between replays this does, on the current
        stream::

            scheduler.step()
            optimizer.refresh()
            graph.replay()

        So it does before a capture, where a number has changed since the last step. An lr that is a
        tensor on the device is read there by every replay.

        A replay is the step of the parameters, groups, gradient tensors, state, rule and flags that
        were captured: it leaves out a group that was added and a parameter that was thawed, and
        goes on with one that was frozen. The next step outside is right; then capture again.

        Raises
        ------
        RuntimeError
            Within a capture; for a group that is not, or no longer, what was captured.
        """
        self._graphs.refresh()

    def release(self) -> None:
        """Let go of the plans and of their memory on the device; state is left as it is.

        Graphs that were captured must not be replayed any more. The next step builds the plans
        again. Call it before a process group is destroyed and before the process exits: what is
        torn down with the interpreter goes in no order, and device memory, graphs and communicators
        may find their driver gone.
        """
        self._graphs.release()

    # -- rules that look at the model ------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Know the model: its parameters' names, and the last batch that goes through it.

        Parameters that came without a name have the model's from now on, as if they had been
        ``model.named_parameters()``: in `describe`, `layer_stats`, error messages and the groups'
        ``param_names``, which state dicts have too. Then ``group["layers"] = "module"`` works.

        A hook on the model keeps a reference to the arguments of its last forward pass with
        gradients. Copies and pickles of optimizer and model do not have it: attach again after
        loading. `rules.BackMatching` and, but for ``"hessian"`` and ``"exact"``,
        `rules.Curvature` need it; others take no notice.

        Raises
        ------
        TypeError
            For anything but a module.
        """
        self._estimation.attach(model)
        assert self._estimation.replay is not None
        if names.adopt(self.param_groups, self._estimation.replay.model):
            self.plans.rebuild_all()

    def detach(self) -> None:
        """Let go of the model."""
        self._estimation.detach()

    @property
    def is_second_order(self) -> bool:
        """Whether the coming step wants ``loss.backward(create_graph=True)``."""
        return self._estimation.is_second_order()

    # -- statistics ----------------------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of the gradients that the last step clipped (``max_grad_norm``), before that.

        A float64 scalar on the device; None where nothing was to clip.
        """
        return self._grad_norm

    def layer_stats(self) -> dict[str, Any]:
        """Statistics of each layer's last step, without waiting for the device.

        Returns
        -------
        dict
            ``names`` (list, parameter order), then 1-D tensors: float64 ``ww gg uu wu`` (sums over
            the weights before the update, the gradient and the step, as the rule sees them, decay
            included), ``scale`` (the rule's number), ``lr`` (effective: lr times ``lr_factor`` or
            the ratio of ``plain_lr``, times scale), ``angle`` (radians between the weights before
            and after), int64 ``skipped`` (steps left out because of a non-finite gradient).

            Of sharded parameters under a rule in gradient order ``ww uu wu`` are those of the step
            before, as they are summed over processes with the next one's message, and ``angle``
            follows from them; nothing is sent here.

            A parameter outside every layer has a row too, with scale 1, since it can be skipped;
            groups without a rule that let non-finite values through are not measured.
        """
        return statistics.layer_stats(self.plans)

    # -- persistence ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's; a rule is stored as its name and plain numbers, callables are left out."""
        handle = self.register_state_dict_post_hook(
            lambda _, packed: pack_groups(packed["param_groups"]), prepend=True
        )
        try:
            return super().state_dict()
        finally:
            handle.remove()

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state is in the bits that the options say; torch.optim's loads too."""
        loaded: dict[str, Any] = {}

        def last(_: Optimizer, final: dict[str, Any]) -> None:
            for group in final["param_groups"]:
                rules.resolve(group.get("rule"))  # an unknown rule is refused before any change
            loaded.update(final)

        handle, self._loading = self.register_load_state_dict_pre_hook(last), loaded
        before = self.state, self.param_groups
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self.state, self.param_groups = before
            raise
        finally:
            handle.remove()
            del self._loading

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, new: dict[str, Any]) -> None:
        current = self.__dict__.get("param_groups", [])
        super().__setstate__(new)
        unpack_groups(self.param_groups, current, self.defaults)
        if hasattr(self, "_loading"):
            restore_state(self.state, self.param_groups, self._loading)
        if "plans" not in self.__dict__:
            self._equip()
        self.plans.take_as_said(key for group in self.param_groups for key in group)
        self.plans.rebuild_all()
