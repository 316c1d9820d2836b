"""The optimizer behind every class: groups to plans, one step over all of them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from . import _C, backends, checks, clipping, estimators, ops, rules, sharding, state
from .backends import COLUMNS, Hyper, Plan, PlanSpec
from .directions import Direction
from .layers import Adapt, LayerKey, LayerTable, build_tables, validate
from .precision import Precision
from .precision import of as precision_of

Rule = str | rules.LayerRule | None


@dataclasses.dataclass(eq=False)
class _GroupPlans:
    """The plans of one param group and what they were built for."""

    group: dict[str, Any]
    key: tuple[Any, ...]
    params: list[Tensor]
    tables: list[LayerTable]
    backends: list[str]
    stats: list[Tensor]
    plans: list[Plan]
    views: list[estimators.Layers]  # of a rule that looks at the model

    def fits(self, key: tuple[Any, ...], params: list[Tensor]) -> bool:
        if torch.compiler.is_compiling():
            same = len(params) == len(self.params) and all(map(operator.is_, params, self.params))
        else:
            same = _C.same_objects(params, self.params)
        return same and key == self.key


class LayerwiseOptimizer(Optimizer):
    """A direction and a layer rule; subclasses name the direction.

    Everything that torch.optim promises holds: param groups, closures, hooks, schedulers, state
    dicts. Group keys of our own: ``rule``, ``layers``, ``adapt``, ``on_nonfinite``,
    ``max_grad_norm``, ``precision`` (as the keyword arguments), ``seed`` (of stochastic rounding),
    ``split`` (blocks of dim 0 that are layers of their own: a number of equal blocks or their
    sizes) and ``lr_scale`` (a factor on lr: a number, or one for each layer).

    Under ``torch.compile`` a step on the CPU engine is one op a group, without a graph break, that
    reads lr, weight decay, momentum, betas and the like when it runs: schedules do not recompile.
    On other engines, of sharded parameters and with ``max_grad_norm`` or ``precision`` the step is
    taken outside of the graph. Steps on a GPU can be captured in CUDA graphs: see `refresh`.
    """

    _grad_norm: Tensor | None = None

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        rule: Rule,
        layers: str | LayerKey,
        adapt: str | Adapt | None,
        backend: str,
        on_nonfinite: Literal["skip", "propagate"] | None,
        max_grad_norm: float | None,
        precision: Precision,
    ) -> None:
        backends.validate(backend)
        self.backend = backend
        self._plans: list[_GroupPlans] = []
        self._captured: list[_GroupPlans] = []  # graphs do not keep what they read alive
        self._handle = ops.handle_of(self)
        self._snapshot: _C.Snapshot | None = None  # of self.state, as the plans know it
        self._watch: estimators.ModelWatch | None = None
        defaults |= {"rule": rules.resolve(rule), "layers": layers, "adapt": adapt}
        defaults |= {
            "on_nonfinite": on_nonfinite,
            "max_grad_norm": max_grad_norm,
            "precision": precision,
        }
        checks.flags(defaults)
        super().__init__(params, defaults)

    # -- what a subclass says ------------------------------------------------------------------

    def _direction(self, group: dict[str, Any]) -> Direction:
        raise NotImplementedError

    def _decoupled(self, group: dict[str, Any]) -> bool:
        return False

    # -- param groups and plans ----------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and create its state; a group that is refused leaves nothing behind."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            # a copy: torch.compile watches one of several ways to an object, not each group's
            group["rule"] = copy.copy(rules.resolve(group["rule"]))
            self._plans.append(self._build(len(self.param_groups) - 1))
        except Exception:
            self.param_groups.pop()
            for p in group["params"]:
                self.state.pop(p, None)
            raise

    def _key(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return (
            self._direction(group),
            group["rule"],
            group["layers"],
            group["adapt"],
            group["on_nonfinite"],
            _hashable(group.get("split")),
            _hashable(group.get("lr_scale")),
            group["precision"],
        )

    def _build(self, index: int) -> _GroupPlans:
        """Tables, state and plans of a group; statistics of unchanged layers are carried over."""
        group = self.param_groups[index]
        if any(checks.capturing(device) for device in {p.device for p in group["params"]}):
            raise RuntimeError(
                f"param group {index} is new or has changed: take a step before capturing one in a "
                "CUDA graph"
            )
        group["rule"] = rules.resolve(group["rule"])
        validate(group)
        checks.params(group, index)
        checks.max_grad_norm(group)
        checks.precision(group, index)
        direction = self._direction(group)
        first = sum(len(g["params"]) for g in self.param_groups[:index])
        old = self._plans[index] if index < len(self._plans) else None
        carried = (
            {(t.device, tuple(t.layers)): s for t, s in zip(old.tables, old.stats, strict=True)}
            if old
            else {}
        )
        self._notice()
        built = _GroupPlans(group, self._key(group), list(group["params"]), [], [], [], [], [])
        for table in build_tables(group, index):
            states = state.complete_table(self.state, table, group, direction, first)
            stats = carried.get((table.device, tuple(table.layers)))
            if stats is None:
                shape = len(table.layers), len(COLUMNS)
                stats = torch.zeros(shape, dtype=torch.float64, device=table.device)
            precision = precision_of(table.params, group["precision"])
            spec = PlanSpec(
                table, direction, group["rule"], states, stats, group["differentiable"], precision
            )
            backend = backends.choose(self.backend, spec)
            built.tables.append(table)
            built.backends.append(backend.name)
            built.stats.append(stats)
            built.plans.append(sharding.plan(backend, spec))
            if isinstance(spec.rule, rules.Estimated):
                built.views.append(estimators.Layers(spec))
        self._snapshot = _C.Snapshot(self.state)
        return built

    def _notice(self) -> None:
        """Mark every plan out of date if ``self.state`` is no longer what they were built from."""
        if self._snapshot is not None and not self._snapshot.matches(self.state):
            for plans in self._plans:
                plans.key = ()
            self._snapshot = None

    def _fitting(self, index: int) -> _GroupPlans:
        group = self.param_groups[index]
        if index >= len(self._plans):  # groups that were appended by hand
            self._plans.extend(self._build(i) for i in range(len(self._plans), index + 1))
        old = self._plans[index]
        if not old.fits(self._key(group), group["params"]):
            new = self._plans[index] = self._build(index)
            if {v.rule.name for v in new.views} - {v.rule.name for v in old.views}:
                group["estimated"] = 0
                for view in new.views:  # another rule's numbers mean something else
                    view.restart()
        return self._plans[index]

    def plans(self, index: int) -> _GroupPlans:
        """Plans of a param group as it stands."""
        self._notice()
        return self._fitting(index)

    def _prepared(self) -> list[tuple[dict[str, Any], _GroupPlans]]:
        """Every group with plans that are up to date and hold checked gradients."""
        self._notice()
        graph = any(checks.capturing(t.device) for plans in self._plans for t in plans.tables)
        ready = []
        for index, group in enumerate(self.param_groups):
            checks.capturable(group)
            if graph:
                checks.capture(group, index)
            plans = self._fitting(index)
            if not all(plan.prepare() for plan in plans.plans):
                plans = self._plans[index] = self._build(index)
                if not all(plan.prepare() for plan in plans.plans):
                    raise RuntimeError("optimizer.state changed while a step was prepared")
            ready.append((group, plans))
        if graph:
            self._captured += [plans for _, plans in ready if plans not in self._captured]
        return ready

    def _hyper(self, group: dict[str, Any], direction: Direction) -> Hyper:
        skip = group["on_nonfinite"] or ("propagate" if group["rule"] is None else "skip")
        lr = group["lr"]
        sign: float | Tensor = -1.0 if group["maximize"] else 1.0
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            sign = sign / scale.double()
        found_inf = getattr(self, "found_inf", None)
        return Hyper(
            lr if not isinstance(lr, Tensor) or self.defaults["differentiable"] else lr.detach(),
            float(group["weight_decay"]),
            self._decoupled(group),
            sign,
            skip == "skip",
            direction.hyper(group),
            0.0 if found_inf is None else found_inf,
        )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `torch.amp.GradScaler` leaves scale and verdict to the step (attributes
        ``grad_scale`` and ``found_inf``): as in torch, where ``fused=True``.
        """  # noqa: D205
        return all(group.get("fused") for group in self.param_groups)

    # -- stepping ------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Perform one step; ``closure`` re-evaluates the model and returns the loss.

        Every gradient is checked before any weight changes.

        Raises
        ------
        RuntimeError
            For a gradient that cannot be used, naming its parameter.
        """
        loss = None
        compiling = torch.compiler.is_compiling()
        # dynamo would make constants of all numbers in param_groups
        groups = [plans.group for plans in self._plans] if compiling else self.param_groups
        estimated = any(_is_estimated(g["rule"]) for g in groups)
        if closure is not None:
            start = estimators.random_state() if estimated else []
            with torch.enable_grad():
                loss = closure()
        if estimated:
            again = None if closure is None else functools.partial(self._again, closure, start)
            self._estimate(again)
        if compiling:
            self._traced()
            return loss
        self._step()
        return loss

    def _step(self) -> None:
        """The eager step."""
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            steps: list[tuple[Plan, Hyper]] = []
            bounds: dict[int, float] = {}
            for group, plans in self._prepared():
                hyper = self._hyper(group, plans.key[0])
                bound = checks.max_grad_norm(group)
                if bound is not None:
                    bounds |= dict.fromkeys(range(len(steps), len(steps) + len(plans.plans)), bound)
                steps += [(plan, hyper) for plan in plans.plans]
            clipped, self._grad_norm = clipping.clip(steps, bounds)
            sharding.step(clipped)

    def _traced(self) -> None:
        """The step as ``torch.compile`` sees it: the registered op, or a graph break."""
        from torch._dynamo.comptime import comptime

        comptime(ops.see_changes)
        for index, plans in enumerate(self._plans):
            group = plans.group
            # a momentum that is not 0 is a number like others, and not looked at
            other = any("momentum_buffer" in p.spec.direction.states for p in plans.plans)
            key = self._key({**group, "momentum": 1.0} if other else group)
            if not plans.fits(key, group["params"]):
                torch._dynamo.disable(self._fitting)(index)  # a graph break
        of_groups = [(plans.group, plans.plans) for plans in self._plans]
        if not all(
            group["max_grad_norm"] is None and all(plan.traceable for plan in of_group)
            for group, of_group in of_groups
        ):
            torch._dynamo.disable(self._step)()  # a graph break
            return
        # here, since it may raise: a graph would leave torch.no_grad() behind
        numbers = torch.ops.layerlr.numbers(self._handle)
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        with torch.no_grad():
            for index, (group, of_group) in enumerate(of_groups):
                tensor = ops.has_tensor_lr(self._handle, index)
                lr = group["lr"].detach() if tensor else None
                for plan in of_group:
                    ops.step_(plan.spec, numbers[index], lr, scale, found_inf)

    def _numbers(self) -> list[tuple[float, ...]]:
        """Of each group, what a compiled step reads when it runs."""
        self._notice()
        rows = []
        for index, group in enumerate(self.param_groups):
            if index >= len(self._plans) or not self._plans[index].fits(
                self._key(group), group["params"]
            ):
                raise RuntimeError(
                    f"param group {index} wants another step than was compiled, since its "
                    "parameters or their state changed, or its momentum became 0: take a step "
                    "outside torch.compile first"
                )
            h = self._hyper(group, self._plans[index].key[0])
            sign = -1.0 if group["maximize"] else 1.0  # the scale is a tensor of the graph
            rows.append((float(h.lr), h.weight_decay, h.decoupled, sign, h.skip, *h.direction))
        return rows

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
        self._notice()
        if any(checks.capturing(t.device) for plans in self._plans for t in plans.tables):
            raise RuntimeError("call refresh() before the capture of a CUDA graph, not within it")
        groups = list(enumerate(self.param_groups))
        for index, group in groups:
            plans = self._plans[index] if index < len(self._plans) else None
            if (
                plans is None
                or not plans.fits(self._key(group), group["params"])
                or (self._captured and plans not in self._captured)
            ):
                raise RuntimeError(
                    f"param group {index} is new or has changed since its step was captured, and "
                    "no replay can follow: take a step outside of the graph, and capture again"
                )
        for index, group in groups:
            for plan in self._plans[index].plans:
                plan.refresh(self._hyper(group, self._plans[index].key[0]))

    def release(self) -> None:
        """Let go of the plans and of their memory on the device; state is left as it is.

        Graphs that were captured must not be replayed any more. The next step builds the plans
        again. Call it before a process group is destroyed and before the process exits: what is
        torn down with the interpreter goes in no order, and device memory, graphs and communicators
        may find their driver gone.
        """
        for plans in self._plans:
            plans.key, plans.plans = (), []
        self._captured = []

    # -- rules that look at the model ------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Let rules look at the model: remember the last batch that goes through it.

        A hook on the model keeps a reference to the arguments of its last forward pass with
        gradients. Copies and pickles of optimizer and model do not have it: attach again after
        loading. `rules.BackMatching` and, but for ``"hessian"`` and ``"exact"``,
        `rules.Curvature` need it; others take no notice.

        Raises
        ------
        TypeError
            For anything but a module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"attach wants a torch.nn.Module, got {type(model).__name__}")
        self.detach()
        self._watch = estimators.ModelWatch(model)

    def detach(self) -> None:
        """Let go of the model."""
        if self._watch is not None:
            self._watch.close()
        self._watch = None

    @property
    def is_second_order(self) -> bool:
        """Whether the coming step wants ``loss.backward(create_graph=True)``."""
        for index, group in enumerate(self.param_groups):
            if _is_estimated(group["rule"]):
                self.plans(index)  # a rule that was just set counts its steps from 0
                rule = group["rule"]
                if rule.second_order and rule.due(group.get("estimated", 0)):
                    return True
        return False

    @torch._disable_dynamo
    def _estimate(self, again: Callable[[], object] | None) -> None:
        """Find the rates of the coming step."""
        if getattr(self, "grad_scale", None) is not None:
            raise RuntimeError(
                "a rule that looks at the gradients wants them unscaled: call "
                "scaler.unscale_(optimizer) before scaler.step(optimizer), or leave fused=True out"
            )
        if float(getattr(self, "found_inf", None) or 0.0):
            return  # there will be no step
        views = []
        with torch.no_grad():
            for group, plans in self._prepared():
                for view in plans.views:
                    hyper = self._hyper(group, plans.key[0])
                    view.begin(group.get("estimated", 0), hyper)
                    views.append(view)
            estimators.estimate(views, self._watch, again)
            for group in self.param_groups:
                estimators.release(group["params"])
        for group in self.param_groups:
            if _is_estimated(group["rule"]):
                group["estimated"] = group.get("estimated", 0) + 1

    def _again(self, closure: Callable[[], object], start: list[Tensor]) -> None:
        """Evaluate the closure once more, as it was evaluated for this step."""
        if self._watch is None:
            raise RuntimeError("call optimizer.attach(model) before the first step")
        with self._watch.unchanged(start), torch.enable_grad():
            closure()

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
            the weights before the update, the gradient and the step), ``scale`` (the rule's
            number), ``lr`` (effective: lr times lr_scale times scale), ``angle`` (radians between
            the weights before and after) and int64 ``skipped`` (steps left out because of a
            non-finite gradient).

            Of sharded parameters under a rule in gradient order ``ww uu wu`` are those of the step
            before, as they are summed over processes with the next one's message, and ``angle``
            follows from them; nothing is sent here.

            A parameter outside every layer has a row too, with scale 1, since it can be skipped;
            groups without a rule that let non-finite values through are not measured.
        """
        names: list[str] = []
        rows: list[Tensor] = []
        for index, group in enumerate(self.param_groups):
            plans = self.plans(index)
            if group["rule"] is None and group["on_nonfinite"] != "skip":
                continue
            for table in plans.tables:
                names += table.layers
            rows += plans.stats
        # not to the host, if there is a device: a copy there would have to be waited for
        device = next((r.device for r in rows if r.device.type != "cpu"), torch.device("cpu"))
        all_rows = (
            torch.cat([r.to(device, non_blocking=True) for r in rows])
            if rows
            else torch.zeros(0, len(COLUMNS), dtype=torch.float64)
        )
        column = dict(zip(COLUMNS, all_rows.unbind(1), strict=True))
        ww, uu, wu, a, b = (column[c] for c in ("ww", "uu", "wu", "a", "b"))
        cross = (ww * uu - wu * wu).clamp(min=0.0).sqrt()
        angle = torch.atan2(b.abs() * cross, a * ww + b * wu)
        shown = {c: column[c].clone() for c in ("ww", "gg", "uu", "wu", "scale", "lr")}
        angle = torch.where(ww > 0, angle, 0.0)
        return {"names": names, **shown, "angle": angle, "skipped": column["skipped"].long()}

    # -- persistence ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's; a rule is stored as its name and plain numbers, callables are left out."""
        handle = self.register_state_dict_post_hook(
            lambda _, packed: state.pack_groups(packed["param_groups"]), prepend=True
        )
        try:
            return super().state_dict()
        finally:
            handle.remove()

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its saved dtype; torch.optim's own state dicts load too."""
        loaded: dict[str, Any] = {}

        def last(_: Optimizer, final: dict[str, Any]) -> None:
            for group in final["param_groups"]:
                rules.resolve(group.get("rule"))  # an unknown rule is refused before any change
            loaded.update(final)

        handle = self.register_load_state_dict_pre_hook(last)
        self._loading = loaded
        before = self.state, self.param_groups, self._plans, self._snapshot
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self.state, self.param_groups, self._plans, self._snapshot = before
            raise
        finally:
            handle.remove()
            del self._loading

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, new: dict[str, Any]) -> None:
        current = self.__dict__.get("param_groups", [])
        super().__setstate__(new)
        state.unpack_groups(self.param_groups, current, self.defaults)
        if hasattr(self, "_loading"):
            state.restore_dtypes(self.state, self.param_groups, self._loading)
        self.__dict__.setdefault("_plans", [])
        self.__dict__.setdefault("_captured", [])
        self.__dict__.setdefault("_watch", None)
        if "_handle" not in self.__dict__:
            self._handle = ops.handle_of(self)
        self._snapshot = None
        self._plans = [self._build(index) for index in range(len(self.param_groups))]


def _is_estimated(rule: Rule) -> bool:
    return isinstance(rules.resolve(rule), rules.Estimated)


def _hashable(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.tolist()
    return tuple(value) if isinstance(value, Sequence) else value
