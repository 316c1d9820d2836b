"""Which runs an experiment still lacks, and how they are trained: here, or in other processes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from bench.data import Data, load
from bench.record import Result
from bench.trainer import Task

from . import workers
from .store import Store

if TYPE_CHECKING:
    from .runner import Arm, Experiment, Job

LARGEST = 24  # runs that are trained in one go


class Training:
    """Trains arms until their store has all of them; `failures` says what could not be."""

    def __init__(
        self,
        experiment: Experiment,
        data: Data,
        read: Callable[[], Data],
        options: argparse.Namespace,
    ) -> None:
        self.experiment, self.data, self.read, self.options = experiment, data, read, options
        self.failures: list[str] = []

    def run(self, arms: Callable[[], list[Arm]], seeds: int, store: Store) -> None:
        """Each of `arms()`, which may become more as the store fills, with each seed."""
        options, train = self.options, self.experiment.train
        with tqdm(total=0, unit="step", smoothing=0.02) as bar:
            queue = Queue(self, arms, seeds, store, bar)
            if options.workers > 1:
                prepare = partial(_prepare, self.read, train)
                workers.run(queue, prepare, options.workers, options.limit)
                return
            while (job := queue.next()) is not None:
                done = bar.n
                queue.done(job, train(job, self.data, bar.update), done)


class Queue:
    """Runs that the store does not have yet; a job that fails is handed out once more."""

    def __init__(
        self,
        training: Training,
        arms: Callable[[], list[Arm]],
        seeds: int,
        store: Store,
        bar: tqdm,
    ) -> None:
        self.training, self.arms, self.seeds, self.store, self.bar = (
            training,
            arms,
            seeds,
            store,
            bar,
        )
        self.given: set[tuple[str, int]] = set()
        self.retried: set[tuple[str, int]] = set()
        self.steps = 0  # of what was handed out

    def next(self) -> Job | None:
        pending = self._pending()
        self.bar.total = self.steps + sum(config.steps for _, config in pending)
        if not pending:
            return None
        job, together = pending[:1], self.training.experiment.together
        if together is not None:
            key = together(*pending[0])
            job = [one for one in pending if together(*one) == key][:LARGEST]
        self.given |= _runs(job)
        self.steps += sum(config.steps for _, config in job)
        self.bar.set_description(f"{job[0][0].name}, seed {job[0][1].seed}")
        return job

    def _pending(self) -> Job:
        arms = self.arms()
        for arm in arms:
            self.store.add_arm(arm.name, settings(arm))
        pairs = [(arm, seed) for arm in arms for seed in range(self.seeds)]
        if self.training.options.workers > 1:  # so that all arms have as many seeds at any time
            pairs.sort(key=lambda pair: pair[1])
        return [
            (arm, replace(arm.config, seed=seed))
            for arm, seed in pairs
            if not self.store.has(arm.name, seed) and (arm.name, seed) not in self.given
        ]

    def done(self, job: Job, results: list[Result], before: int | None = None) -> None:
        """`before`: where the bar stood when the job began, if it has moved since."""
        found = zip(job, results, strict=True)
        self.store.add(*((arm.name, config.seed, result) for (arm, config), result in found))
        steps = sum(config.steps for _, config in job)
        self.bar.update(steps if before is None else before + steps - self.bar.n)

    def failed(self, job: Job, why: str) -> None:
        names = ", ".join(sorted({arm.name for arm, _ in job}))
        tqdm.write(f"FAILED {names}\n{why}")
        if _runs(job) & self.retried:
            self.training.failures.append(f"{names}: {why.strip().splitlines()[-1]}")
        else:
            self.retried |= _runs(job)
            self.given -= _runs(job)


def _runs(job: Job) -> set[tuple[str, int]]:
    return {(arm.name, config.seed) for arm, config in job}


def read_data(name: str, folder: Path, scaling: str, items: int | None) -> Data:
    data = load(name, folder, scaling)
    return data if items is None else data.some(items)


def settings(arm: Arm) -> dict[str, Any]:
    """What a run's numbers depend on, but for its seed; the rate, also where it is a default."""
    free = ["seed", "folder", "device", "threads", "checkpoint_every"]
    if arm.task != Task.of:
        free.append("model")  # the experiment's own
    found = asdict(arm.config) | {"lr": arm.config.rate}
    return {key: value for key, value in found.items() if key not in free}


def _prepare(
    read: Callable[[], Data], train: Callable[[Any, Data, Callable[[int], object]], Any]
) -> Callable[[Any], Any]:
    data = read()
    return lambda job: train(job, data, lambda steps: None)
