"""Several runs of one network trained as one: their weights stacked, each with its own optimizer.

A small network leaves a GPU idle between launches. Here one launch serves all runs: the network is
mapped over the stacked weights, while optimizers see the parameters of their own run, as views.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .config import Config
from .record import Result, machine
from .train import settings
from .trainer import TEST_BATCH, Batches, Task, usable

_ALIGNED = 64  # numbers; parameters of a run begin at multiples


class Stack:
    """The parameters of equal models, in one matrix with a row for each model.

    ``leaves`` maps a name to the parameters of that name, stacked, and ``gradients`` lie in the
    same order. The models' own parameters and gradients become views of rows.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        each = [dict(model.named_parameters()) for model in models]
        shapes = {name: p.shape for name, p in each[0].items()}
        if any({name: p.shape for name, p in other.items()} != shapes for other in each):
            raise ValueError("the models differ in their parameters")
        places, size = {}, 0
        for name, shape in shapes.items():
            places[name] = (size, size + shape.numel())
            size += -(-shape.numel() // _ALIGNED) * _ALIGNED
        first = next(iter(each[0].values()))
        rows = torch.zeros(len(models), size, device=first.device, dtype=first.dtype)
        self.grads = torch.zeros_like(rows)
        self.leaves: dict[str, Tensor] = {}
        self.gradients: list[Tensor] = []
        for name, (begin, end) in places.items():
            shape = shapes[name]
            for row, grad, named in zip(rows, self.grads, each, strict=True):
                view = row[begin:end].view(shape)
                view.copy_(named[name].detach())
                named[name].data = view
                named[name].grad = grad[begin:end].view(shape)
            self.leaves[name] = rows[:, begin:end].view(len(models), *shape).requires_grad_()
            self.gradients.append(self.grads[:, begin:end].view(len(models), *shape))

    def backward(self, loss: Tensor) -> None:
        torch._foreach_copy_(self.gradients, torch.autograd.grad(loss, list(self.leaves.values())))

    def clip(self, limits: Tensor) -> None:
        """As `torch.nn.utils.clip_grad_norm_`, for each model by itself."""
        norms = torch.linalg.vector_norm(self.grads, dim=1)
        self.grads.mul_((limits / (norms + 1e-6)).clamp(max=1.0).unsqueeze(1))


class Fleet:
    """Runs between two steps. They share data, network, length and times of tests."""

    def __init__(self, configs: Sequence[Config], tasks: Sequence[Task]) -> None:
        first, self.task = configs[0], tasks[0]
        for key in ("steps", "batch", "eval_every", "device", "threads"):
            if len({getattr(config, key) for config in configs}) > 1:
                raise ValueError(f"runs that are trained together differ in {key}")
        self.configs, self.device = configs, usable(first.device)
        self.data = self.task.data.to(self.device)
        self.models = [task.model.to(self.device) for task in tasks]
        self.stack = Stack(self.models)
        self.optimizers = [
            task.optimizer(config, model)
            for config, task, model in zip(configs, tasks, self.models, strict=True)
        ]
        self.rates = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        bounds = [float("inf") if config.clip is None else config.clip for config in configs]
        self.bounds = torch.tensor(bounds, device=self.device)
        items = len(self.data.x)
        self.batches = {
            config.seed: Batches(items, config.batch, config.seed, self.device)
            for config in configs
        }
        self.step, self.seconds = 0, 0.0
        self.losses = torch.full((first.steps, len(configs)), torch.nan, device=self.device)
        self.records: list[list[dict[str, Any]]] = [[] for _ in configs]
        self.ended: list[int | None] = [None] * len(configs)  # where a run diverged
        self._mapped = vmap(self._loss)
        self._tested = vmap(self._loss, in_dims=(0, None, None))

    def _loss(self, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return self.task.loss(functional_call(self.models[0], weights, x), y)

    def run(self, after_step: Callable[[int], object] | None) -> None:
        first, started = self.configs[0], time.perf_counter()
        while self.step < first.steps and None in self.ended:
            self._one_step()
            if after_step is not None:
                after_step(self.ended.count(None))
            every = first.eval_every
            if self.step == first.steps or (every and self.step % every == 0):
                recent = self.losses[max(0, self.step - 50) : self.step].mean(0).tolist()
                self.seconds += time.perf_counter() - started  # tolist has waited for the device
                self._test(recent)
                started = time.perf_counter()

    def _one_step(self) -> None:
        chosen = {seed: batches(self.step) for seed, batches in self.batches.items()}
        rows = torch.stack([chosen[config.seed] for config in self.configs])
        losses = self._mapped(self.stack.leaves, self.data.x[rows], self.data.y[rows])
        self.stack.backward(losses.sum())
        self.stack.clip(self.bounds)
        for i, (config, optimizer) in enumerate(zip(self.configs, self.optimizers, strict=True)):
            if self.ended[i] is None:
                factor = config.factor(self.step)
                for group, rate in zip(optimizer.param_groups, self.rates[i], strict=True):
                    group["lr"] = rate * factor
                optimizer.step()
        self.losses[self.step] = losses.detach()
        self.step += 1

    def _test(self, recent: Sequence[float]) -> None:
        total = torch.zeros(len(self.configs), device=self.device)
        x, y = self.data.test_x, self.data.test_y
        with torch.no_grad():
            for part_x, part_y in zip(x.split(TEST_BATCH), y.split(TEST_BATCH), strict=True):
                losses = self._tested(self.stack.leaves, part_x, part_y)
                total += losses * (len(part_y) / len(y))
        finite = torch.isfinite(self.losses[self.step - 1]).tolist()
        for i, (train, test) in enumerate(zip(recent, total.tolist(), strict=True)):
            if self.ended[i] is not None:
                continue
            rate = self.optimizers[i].param_groups[0]["lr"]
            times = {"step": self.step, "seconds": self.seconds, "lr": rate}
            self.records[i].append(times | {"train_loss": train, "test_loss": test})
            self.ended[i] = None if finite[i] else self.step

    def results(self) -> list[Result]:
        losses, found = self.losses[: self.step].T.tolist(), []
        for i, config in enumerate(self.configs):
            steps, last = self.ended[i] or self.step, self.records[i][-1]
            final = {
                "complete": steps == config.steps,
                "diverged": self.ended[i] is not None,
                "steps": steps,
                "seconds": self.seconds,
                "together": len(self.configs),
                "parameters": sum(p.numel() for p in self.models[i].parameters()),
                "step_ms": 1e3 * self.seconds / self.step,
                **{key: last[key] for key in ("train_loss", "test_loss")},
            }
            shown = asdict(config) | {"lr": config.rate}
            result = Result(config.name, shown, final, self.records[i], losses[i][:steps])
            result.machine = machine(self.device)
            found.append(result)
        return found


@contextmanager
def _products(device: str) -> Iterator[None]:
    """Matrix products of a GPU in TF32, whose 10 bits are enough to compare optimizers."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if device.startswith("cuda") else before)
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def train_together(
    configs: Sequence[Config],
    tasks: Sequence[Task],
    after_step: Callable[[int], object] | None = None,
) -> list[Result]:
    """Train each config with its task, all at once; their results.

    The tasks share data, loss and the network's layout and have no error. Equal to training them
    one by one up to the rounding of sums (and of products, on a GPU). Layer rotation is not
    recorded.
    """
    first = configs[0]
    with settings(first), _products(first.device):
        fleet = Fleet(configs, tasks)
        fleet.run(after_step)
        return fleet.results()
