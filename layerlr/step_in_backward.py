"""Stepping inside backward: each layer as soon as its gradient is complete, which is then freed."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from . import checks, devices, options, rules
from .graphs import check_capturable
from .group_plans import GroupPlans
from .optimizer import LayerwiseOptimizer
from .steppable import Unit, units
from .wrapping import Wrapped


def steps_in_backward(optimizer: Optimizer) -> bool:
    """Whether an optimizer's layers step before its ``step()``."""
    return _before_step in optimizer._optimizer_step_pre_hooks.values()


def step_in_backward(model: nn.Module, optimizer: LayerwiseOptimizer) -> StepInBackward:
    """Step each layer inside ``backward()`` and free its gradient.

    A layer rule needs nothing but its own layer's sums, so a layer can step as soon as its last
    parameter has its gradient: the weights are those of ``backward(); step(); zero_grad()``, to
    the bit, but gradients never exist all at once. The training loop stays as it is::

        handle = layerlr.step_in_backward(model, optimizer)
        for x, y in batches:
            loss(model(x), y).backward()  # steps
            optimizer.step()  # what is left; hooks, schedulers
            scheduler.step()

    and for gradients of several batches all but the last run within `StepInBackward.accumulate`.

    What steps together is a layer, or, where ``split`` tensors tie them, all layers and tensors
    that hang together; a parameter outside the layers steps alone. What is not complete in a pass
    (a parameter of it has no gradient) steps in ``optimizer.step()``, as do parameters of the
    optimizer that are not the model's, and those added or unfrozen since the last step.

    Parameters
    ----------
    model
        Whose parameters step in backward. Parameters shared by several modules step once.
    optimizer
        Of this package. Learning rates and other numbers are read when a layer steps: set them
        before ``backward()``.

    Returns
    -------
    StepInBackward
        With ``accumulate()`` and ``remove()``. It lives as long as the optimizer.

    Raises
    ------
    TypeError
        For another optimizer, a wrapper, or no module.
    ValueError
        For an optimizer that has none of the model's parameters, or one of them twice;
        ``differentiable=True``; what needs every gradient at once: rules that look at the model, a
        group's ``max_grad_norm``; `DistributedDataParallel`, which averages gradients after the
        layers would have stepped. Settings that change later are refused in ``backward()``.
    RuntimeError
        For an optimizer that steps in backward already.

    Notes
    -----
    Costs a Python call a parameter and a plan of its own for each layer: launches are as many as
    layers. The memory that is saved is all gradients' but the largest unit's; tied weights are
    complete late (an embedding that is the output layer too: at the very end).

    - *Everything that looks at all gradients sees none*: ``torch.nn.utils.clip_grad_norm_``,
      ``torch.amp.GradScaler`` (its loss would be stepped with as scaled; its ``step`` is refused).
    - Every backward outside `accumulate` steps: two of them step twice. A second one through the
      same graph (``retain_graph``) is an error of torch's, since weights have changed: run the
      first within `accumulate`. So is a weight used ``.detach()``-ed below a layer that stepped.
    - Gradients are checked layer by layer, and an error in the midst of backward leaves the layers
      above it stepped; ``zero_grad()``, and the next pass is as any other.
    - Post-accumulate hooks that were registered before see the gradient of a layer's last
      parameter, later ones find None; those of tensors (``register_hook``) may change it.
    - Reentrant activation checkpointing runs a backward of its own for each segment, so a
      parameter used in two of them would step twice: take ``use_reentrant=False``.
    - Under FSDP2 (``fully_shard``) layers step as their sharded gradients come in, each with a
      message of its own; ``model.set_requires_gradient_sync(False)`` within `accumulate` spares the
      messages of gradients.
    - A model compiled as one graph gives all its gradients at once: same numbers, no saving.
    """
    checks.module("step_in_backward", model)
    if not isinstance(optimizer, LayerwiseOptimizer) or isinstance(optimizer, Wrapped):
        wrapper = ", whose base steps once a step" if isinstance(optimizer, Wrapped) else ""
        raise TypeError(
            "step_in_backward wants an optimizer of layerlr, got "
            f"{type(optimizer).__name__}{wrapper}"
        )
    if steps_in_backward(optimizer):
        raise RuntimeError("the optimizer steps in backward already: remove() that handle first")
    if any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            "step_in_backward does not work under DistributedDataParallel, which averages "
            "gradients after a layer has stepped"
        )
    return StepInBackward(model, optimizer)


class StepInBackward:
    """The handle that `step_in_backward` makes and returns."""

    def __init__(self, model: nn.Module, optimizer: LayerwiseOptimizer) -> None:
        self._model = model
        # the optimizer owns its handle, by its hooks; a cycle through a tensor's hooks would never
        # be collected
        self._optimizer = optimizer
        self._lock = threading.RLock()  # autograd has a thread for each device
        self._built: list[GroupPlans] = []
        self._params: list[Tensor] = []  # the optimizer's that are the model's
        self._units: dict[int, Unit] = {}  # by id of parameter
        self._hooks: dict[int, tuple[Tensor, RemovableHandle]] = {}
        self._frozen: list[Tensor] = []  # parameters of units that cannot have a hook yet
        self._accumulating = 0
        self._steps = 0
        self._pass = (-1, -1)
        self._sync()
        if not self._units:
            raise ValueError("the optimizer has none of the model's parameters")
        self._of_step = [
            optimizer.register_step_pre_hook(_before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def __repr__(self) -> str:
        n = len({id(u) for u in self._units.values()})
        return f"{type(self).__name__}({len(self._units)} parameters in {n} units)"

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Within it backward adds gradients up and nothing steps; it may be nested.

        ``optimizer.step()`` steps with what has been added up, within and outside.
        """
        self._accumulating += 1
        try:
            yield
        finally:
            self._accumulating -= 1

    def remove(self) -> None:
        """Step in ``optimizer.step()`` again; gradients stay as they are."""
        for _, hook in self._hooks.values():
            hook.remove()
        for hook in self._of_step:
            hook.remove()
        self._of_step, self._hooks, self._units, self._built, self._params = [], {}, {}, [], []

    # -- what hooks call -----------------------------------------------------------------------

    def _arrived(self, p: Tensor) -> None:
        """The gradient of a parameter is complete."""
        if self._accumulating:
            return
        with self._lock, torch.no_grad():
            # a pass is a run of the engine: what one that failed had counted does not count
            now = self._steps, torch._C._current_graph_task_id()
            if now != self._pass:
                self._sync()
                self._pass = now
            unit = self._units.get(id(p))
            if unit is not None and unit.complete_with(p, now):
                self._step(unit)

    def _step(self, unit: Unit) -> None:
        if not unit.prepare():
            self._optimizer.plans.rebuild(unit.group)
            self._sync()
            unit = self._units[id(unit.spec.table.params[0])]
            if not unit.prepare():
                raise RuntimeError("optimizer.state changed while a step was prepared")
        cache = self._optimizer.plans
        unit.step(cache.config(cache.groups[unit.group]))
        for p in unit.spec.table.params:
            p.grad = None

    @torch._disable_dynamo
    def _after_step(self, *_: object) -> None:
        """What was left has stepped: free it, and look for parameters that are new."""
        with self._lock:
            for p in self._params:
                p.grad = None
            self._steps += 1
            self._sync()
            for key in self._hooks.keys() - self._units.keys():
                self._hooks.pop(key)[1].remove()

    def _sync(self) -> None:
        """Bring the units up to date with the optimizer's groups and state."""
        optimizer = self._optimizer
        _refuse(optimizer)
        built = optimizer.plans.every()
        if any(of_table.table.again for plans in built for of_table in plans.tables):
            raise ValueError("step_in_backward does not work with a parameter that is listed twice")
        if [id(x) for x in built] != [id(x) for x in self._built]:
            of_model = {id(p) for p in self._model.parameters()}
            every = (p for group in optimizer.param_groups for p in group["params"])
            self._params = [p for p in every if id(p) in of_model]
            self._built, self._units, self._frozen = built, {}, []
            for unit in (u for i, plans in enumerate(built) for u in units(i, plans)):
                params = unit.spec.table.params
                if all(id(p) in of_model for p in params):
                    self._units |= dict.fromkeys(map(id, params), unit)
                    self._frozen += [p for p in params if id(p) not in self._hooks]
        for p in self._frozen:
            if p.requires_grad:
                self._hooks[id(p)] = p, p.register_post_accumulate_grad_hook(_Hook(self))
        self._frozen = [p for p in self._frozen if id(p) not in self._hooks]


class _Hook:
    """A parameter's, which does not keep the handle alive."""

    def __init__(self, handle: StepInBackward) -> None:
        self.handle = weakref.ref(handle)

    def __call__(self, p: Tensor) -> None:
        handle = self.handle()
        if handle is not None:
            handle._arrived(p)


def _refuse(optimizer: LayerwiseOptimizer) -> None:
    check_capturable(optimizer.param_groups)
    for group in optimizer.param_groups:
        rule = rules.resolve(group["rule"])
        if isinstance(rule, rules.Estimated):
            raise ValueError(
                f"step_in_backward does not work with rule {rule.name!r}, which looks at the model "
                "once all gradients are complete"
            )
        if options.max_grad_norm(group) is not None:
            raise ValueError(
                "step_in_backward does not work with max_grad_norm: the norm of all gradients is "
                "known only after the first layers have stepped"
            )
        if group["differentiable"]:
            raise ValueError("step_in_backward does not work with differentiable=True")
        if any(devices.capturing(p.device) for p in group["params"][:1]):
            raise RuntimeError(
                "step_in_backward cannot be captured in a CUDA graph: remove() the handle first"
            )


@torch._disable_dynamo
def _before_step(optimizer: LayerwiseOptimizer, *_: object) -> None:
    _refuse(optimizer)
    if getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError(
            "step_in_backward does not work with GradScaler: layers have stepped before it could "
            "look at their gradients; train in bfloat16, or remove() the handle"
        )
