"""The state of one training run between two steps, and how to save and restore it."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerlr.monitor

from .config import Config, build_optimizer
from .data import Data, load
from .models import build
from .record import Result, machine, write_atomically

# Large enough for a GPU, small enough for the activations to stay near the cores of a CPU.
TEST_BATCH = 250


@dataclass(frozen=True)
class Task:
    """What is learned: data, a fresh network, a mean loss and (or None) a mean error.

    `optimizer` builds what trains it, where the config alone does not say it.
    """

    data: Data
    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    error: Callable[[Tensor, Tensor], Tensor] | None = lambda output, y: (
        (output.argmax(1) != y).double().mean()
    )
    optimizer: Callable[[Config, nn.Module], torch.optim.Optimizer] = build_optimizer

    @classmethod
    def of(cls, config: Config, data: Data | None = None) -> Task:
        """The task that `config` names; `data` saves reading it again."""
        data = data or load(config.data, config.folder, config.scaling)
        if config.holdout:
            data = data.holdout()
        return cls(data, build(config.model, data.shape, data.classes, config.seed))


class Batches:
    """Step -> indices: a fresh permutation each epoch, a function of seed and step alone.

    Nothing to store in a checkpoint. The last, incomplete batch of an epoch is left out.
    """

    def __init__(self, items: int, batch: int, seed: int, device: torch.device) -> None:
        self.items, self.batch, self.seed, self.device = items, min(batch, items), seed, device
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        epoch, position = divmod(step, self.items // self.batch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.items, generator=generator)
            self._epoch, self._order = epoch, order.to(self.device)
        return self._order[position * self.batch : (position + 1) * self.batch]


class Trainer:
    """The state of a run between two steps."""

    def __init__(self, config: Config, task: Task) -> None:
        self.config, self.task = config, task
        self.device = usable(config.device)
        self.data = task.data.to(self.device)
        self.model = task.model.to(self.device)
        self.optimizer = task.optimizer(config, self.model)
        if config.rule in layerlr.rules.ESTIMATED:
            self.optimizer.attach(self.model)  # type: ignore[attr-defined]
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, config.factor)
        self.monitor = layerlr.monitor.LayerRotation(self.model)
        self.stats = layerlr.monitor.StatsLog(self.optimizer) if config.rule != "none" else None
        self.batches = Batches(len(self.data.x), config.batch, config.seed, self.device)
        self.step = 0
        self.seconds = 0.0
        self.records: list[dict[str, Any]] = []
        # On the device: reading each loss on the host would wait for the GPU at every step.
        self.losses = torch.full((config.steps,), torch.nan, device=self.device)
        self.segments: list[float] = []  # seconds a step, one figure between two pauses
        self.optimizer_seconds: list[float] = []
        torch.manual_seed(config.seed)

    # --- the run ---

    def run(self, stop: int, after_step: Callable[[int], object] | None) -> None:
        """Train to step `stop`, unless the loss ceases to be finite."""
        if self.step == 0 and self.config.monitor_every:
            self.monitor.record(0)
        start, started = self.step, self._now()
        while self.step < stop:
            self._one_step()
            if after_step is not None:
                after_step(1)
            if self._pause_due():
                now = self._now()
                self._segment(start, now - started)
                self._pause()
                if self.diverged:
                    return
                start, started = self.step, self._now()
        self._segment(start, self._now() - started)

    @property
    def diverged(self) -> bool:
        return self.step > 0 and not bool(torch.isfinite(self.losses[self.step - 1]))

    def _one_step(self) -> None:
        indices = self.batches(self.step)
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model(self.data.x[indices]), self.data.y[indices])
        if second := getattr(self.optimizer, "is_second_order", False):
            _backward_twice_differentiable(loss)
        else:
            loss.backward()
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        before = time.perf_counter()
        self.optimizer.step()
        self.optimizer_seconds.append(time.perf_counter() - before)
        if second:  # gradients and their graph hold each other: let go of both
            self.optimizer.zero_grad()
        self.scheduler.step()
        self.losses[self.step] = loss.detach()
        self.step += 1

    def _pause_due(self) -> bool:
        every = (self.config.eval_every, self.config.monitor_every, self.config.checkpoint_every)
        return self.step == self.config.steps or any(n and self.step % n == 0 for n in every)

    def _pause(self) -> None:
        config, last = self.config, self.step == self.config.steps
        if config.monitor_every and (last or self.step % config.monitor_every == 0):
            self.monitor.record(self.step)
            if self.stats is not None:
                self.stats.record(self.step)
        if last or self.diverged or (config.eval_every and self.step % config.eval_every == 0):
            self.records.append(self._test())

    def _segment(self, start: int, seconds: float) -> None:
        if self.step > start:
            self.seconds += seconds
            self.segments.append(seconds / (self.step - start))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _test(self) -> dict[str, Any]:
        self.model.eval()
        found = []  # read together: each reading waits for the device
        with torch.no_grad():
            for x, y in zip(
                self.data.test_x.split(TEST_BATCH),
                self.data.test_y.split(TEST_BATCH),
                strict=True,
            ):
                output, measures = self.model(x), (self.task.loss, self.task.error)
                found.append(torch.stack([m(output, y).double() for m in measures if m]))
        parts = [len(y) / len(self.data.test_y) for y in self.data.test_y.split(TEST_BATCH)]
        loss, *error = (
            sum(part * value for part, value in zip(parts, values, strict=True))
            for values in torch.stack(found, 1).tolist()
        )
        self.model.train()
        recent = self.losses[max(0, self.step - 50) : self.step]
        record = {
            "step": self.step,
            "train_loss": recent.mean().item(),
            "test_loss": loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": self.seconds,
        }
        return record | {"test_error": error[0]} if error else record

    # --- checkpoint and result ---

    def state_dict(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            "config": asdict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "records": self.records,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "monitor": self.monitor.state_dict(),
            "stats": None if self.stats is None else self.stats.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Where and how often to write or to run may change, what is computed may not.
        free = {"folder", "device", "threads", "checkpoint_every"}
        ours = asdict(self.config)
        for key, theirs in state["config"].items():
            if key not in free and ours.get(key) != theirs:
                raise ValueError(
                    f"the checkpoint is of another run: {key} was {theirs!r}, now {ours.get(key)!r}"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.monitor.load_state_dict(state["monitor"])
        if self.stats is not None:
            self.stats.load_state_dict(state["stats"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.records = state["records"]
        self.losses.copy_(state["losses"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def save(self, path: Path) -> None:
        write_atomically(path, lambda file: torch.save(self.state_dict(), file))

    def resume(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except OSError:
            raise
        except Exception as error:  # bytes that are no checkpoint raise whatever they lead to
            raise ValueError(f"{path}: not a whole checkpoint of this runner: {error}") from error
        if not (isinstance(state, dict) and state.keys() >= {"config", "model", "rng"}):
            raise ValueError(f"{path}: not a checkpoint of this runner")
        for key in ("rng", "cuda_rng"):  # torch wants these on the host
            state[key] = None if state[key] is None else state[key].cpu()
        self.load_state_dict(state)

    def result(self) -> Result:
        last = self.records[-1] if self.records else {}
        final = {
            "complete": self.step == self.config.steps,
            "diverged": self.diverged,
            "steps": self.step,
            "seconds": self.seconds,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "step_ms": 1e3 * statistics.median(self.segments) if self.segments else None,
            **{key: last[key] for key in ("train_loss", "test_loss", "test_error") if key in last},
        }
        if self.device.type == "cpu" and self.optimizer_seconds:
            final["optimizer_ms"] = 1e3 * statistics.median(self.optimizer_seconds)
        return Result(
            self.config.name,
            asdict(self.config) | {"lr": self.config.rate},
            final,
            self.records,
            self.losses[: self.step].tolist(),
            self._rotation(),
            self._rates(),
            machine(self.device),
        )

    def _rotation(self) -> dict[str, Any]:
        curves = self.monitor.curves()
        if not curves.steps:
            return {}
        return {"names": curves.names, "steps": curves.steps, "distance": curves.distances.tolist()}

    def _rates(self) -> dict[str, Any]:
        if self.stats is None or not len(self.stats):
            return {}
        curves = self.stats.curves("lr")
        return {"names": curves.names, "steps": curves.steps, "lr": curves.values.tolist()}


def _backward_twice_differentiable(loss: Tensor) -> None:
    """Gradients that have gradients: for a rule that wants curvature, announced as in timm."""
    with warnings.catch_warnings():
        # The reference cycle that torch warns of is undone by zero_grad after the step.
        warnings.filterwarnings("ignore", "Using backward.* with create_graph", UserWarning)
        loss.backward(create_graph=True)


def usable(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {error}") from error
