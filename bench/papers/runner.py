"""The runner that all experiments share: arms x seeds on one data set, resumable, in parallel.

An experiment names its arms (a `Config` and a `Task` each), its data set and its budgets: the
paper's, one for a CPU core (``--scale cpu``: smaller, but trained to its end) and a rehearsal's.
`main` gives it a command line and trains each arm with each seed, under one progress bar. Every
finished pair goes into ``NAME.json`` at once, so that a killed run loses one pair at most and the
same command goes on where it stopped; then come the table (``NAME.md``) and the plot
(``NAME.png``). Rates that are searched for are searched first, on a held-out third of the train
set; what was found stands in ``NAME_rates.json``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from bench.config import Config
from bench.data import Data, DataError
from bench.record import Result, write_atomically
from bench.train import train
from bench.trainer import Task

from . import report
from .store import Store
from .training import Training, read_data

SCALES = ("paper", "cpu")


@dataclass(frozen=True)
class Budget:
    """How much is trained: as many iterations, or as many epochs, of `batch` examples."""

    seeds: int
    batch: int
    iterations: int | None = None
    epochs: int | None = None
    items: int | None = None  # at most so many examples to learn from, and to test on

    def steps(self, examples: int) -> int:
        if self.iterations is not None:
            return self.iterations
        return (self.epochs or 1) * max(examples // self.batch, 1)


@dataclass(frozen=True)
class Search:
    """The rate of an arm: the best of `rates` for `config`, by one run each on held-out data.

    Arms whose searches have the same name share one.
    """

    name: str
    config: Config
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Arm:
    """One way to train: `task` makes data, network and loss of a config (and its seed)."""

    name: str
    config: Config
    task: Callable[[Config, Data], Task] = Task.of
    search: Search | None = None


Job = list[tuple[Arm, Config]]  # what is trained in one go; the config has the seed
AfterStep = Callable[[int], object]


@dataclass(frozen=True)
class Scope:
    """What arms are made from: the data, the run's length, the command line, what is known."""

    data: Data
    base: Config
    options: argparse.Namespace
    store: Store | None = None  # of the results so far
    seeds: int = 1

    def config(self, **choices: Any) -> Config:
        return replace(self.base, **choices)


def one_by_one(job: Job, data: Data, after_step: AfterStep) -> list[Result]:
    return [train(config, arm.task(config, data), after_step=after_step) for arm, config in job]


@dataclass(frozen=True)
class Experiment:
    """Arms on a data set, and what is drawn of them.

    `arms` is asked again after each run, so that arms can follow from results.
    """

    name: str
    data: str
    network: str  # in words, for the record
    full: Budget
    quick: Budget
    arms: Callable[[Scope], list[Arm]]
    cpu: Budget | None = None  # sized to one core
    scaling: str = "standard"
    notes: str = ""  # where it departs from the paper, for the record
    table: Callable[[Store], Table] = report.errors
    plot: Callable[[Store, Path], Path] = report.curves
    examples: int | None = None  # in an epoch, where arms take a part of the data
    evals: int = 10  # tests in a run
    records: int = 50  # points of a rotation curve
    more: dict[str, Any] = field(default_factory=dict)  # settings for the record
    train: Callable[[Job, Data, AfterStep], list[Result]] = one_by_one
    together: Callable[[Arm, Config], Hashable] | None = None  # equal: trained in one go


@dataclass(frozen=True)
class network:
    """The task of learning the data with a network that the config's seed alone draws."""

    build: Callable[[tuple[int, ...], int], nn.Module]
    more: dict[str, Any]

    def __init__(self, build: Callable[[tuple[int, ...], int], nn.Module], **more: Any) -> None:
        object.__setattr__(self, "build", build)
        object.__setattr__(self, "more", more)

    def __call__(self, config: Config, data: Data) -> Task:
        data = data.holdout() if config.holdout else data
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return Task(data, self.build(data.shape, data.classes), **self.more)


def parser_of(description: str | None, scale: str) -> argparse.ArgumentParser:
    """Command line with the arguments that one experiment and a queue of them take."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="folder of the data sets")
    add("--out", type=Path, default=Path("runs/papers"), help="folder for what is written")
    add("--scale", choices=SCALES, default=scale, help="as published, or sized to a CPU core")
    add("--quick", action="store_true", help="a rehearsal of a few minutes, no measurement")
    return parser


def parser(
    description: str | None, arguments: Callable[[argparse.ArgumentParser], object] | None
) -> argparse.ArgumentParser:
    """Command line of one experiment, with arguments of its own."""
    parser = parser_of(description, "paper")
    add = parser.add_argument
    add("--seeds", type=_positive, help="runs of each arm, seeds 0 to SEEDS - 1")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--iterations", type=_positive, help="steps of each run")
    length.add_argument("--epochs", type=_positive, help="or its epochs")
    add("--batch", type=_positive, help="examples a step")
    add("--items", type=_positive, help="only so many examples to learn from, and to test on")
    add("--only", default="", metavar="REGEX", help="only the arms whose names match")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=_positive, default=1, help="CPU threads")
    add("--workers", type=_positive, default=1, help="processes that train")
    add("--limit", type=float, default=3600.0, help="seconds that a worker may train in one go")
    if arguments is not None:
        arguments(parser)
    return parser


def main(
    description: str | None,
    experiment: Callable[[argparse.Namespace], Experiment],
    argv: Sequence[str] | None = None,
    arguments: Callable[[argparse.ArgumentParser], object] | None = None,
) -> Store:
    """Command line of an experiment, and its run."""
    ours = parser(description, arguments)
    options = ours.parse_args(argv)
    try:
        return run(experiment(options), options)
    except (DataError, ValueError, re.error) as error:
        ours.error(str(error))


def run(experiment: Experiment, options: argparse.Namespace) -> Store:
    """Train what is not yet in the store, then write table and plot."""
    budget = _budget(experiment, options)
    read = partial(read_data, experiment.data, options.data, experiment.scaling, budget.items)
    data = read()
    examples = experiment.examples or len(data.y)
    steps = budget.steps(examples)
    base = Config(
        data=experiment.data,
        scaling=experiment.scaling,
        batch=budget.batch,
        steps=steps,
        eval_every=max(steps // experiment.evals, 1),
        monitor_every=max(steps // experiment.records, 1),
        device=options.device,
        threads=options.threads,
    )
    name = experiment.name + ("" if options.scale == "paper" else f"_{options.scale}")
    about = {
        "experiment": name,
        "network": experiment.network,
        "notes": experiment.notes,
        "data": dict(data.meta),
        "epoch": max(examples // budget.batch, 1),
        **experiment.more,
    }
    store = Store.open(options.out / f"{name}.json", about)
    scope = Scope(data, base, options, store, budget.seeds)

    def chosen() -> list[Arm]:
        return [arm for arm in experiment.arms(scope) if re.search(options.only, arm.name)]

    if not chosen():
        raise ValueError(f"no arm matches {options.only!r}")
    how = Training(experiment, data, read, options)
    searched = _search(chosen(), options.out / f"{name}_rates.json", about, how)

    def settled() -> list[Arm]:
        return [
            replace(arm, config=replace(arm.config, lr=searched.get(arm.name, arm.config.lr)))
            for arm in chosen()
        ]

    how.run(settled, budget.seeds, store)
    _report(experiment, store)
    if how.failures:
        raise ValueError(f"{len(how.failures)} jobs failed; {how.failures[0]}")
    return store


def _search(
    arms: Sequence[Arm], path: Path, about: dict[str, Any], how: Training
) -> dict[str, float]:
    """Arm -> its rate, for those that search one."""
    searches = {arm.search.name: (arm.search, arm.task) for arm in arms if arm.search}
    if not searches:
        return {}
    store, tried, best = Store.open(path, about), [], {}
    for search, task in searches.values():
        config = replace(search.config, holdout=True, eval_every=0, monitor_every=0)
        for rate in search.rates:
            tried.append(Arm(rate_name(search.name, rate), replace(config, lr=rate), task))
    how.run(lambda: tried, 1, store)
    for name, (search, _) in searches.items():
        kept = {}
        for rate in search.rates:
            (run,) = store.runs(rate_name(name, rate))
            if not run["final"]["diverged"]:
                kept[rate] = run["final"][store.metric]
        if not kept:
            raise ValueError(f"{name}: every rate of {search.rates} diverged")
        best[name] = min(kept, key=lambda rate: kept[rate])
    return {arm.name: best[arm.search.name] for arm in arms if arm.search}


def rate_name(name: str, rate: float) -> str:
    return f"{name}, rate {rate:g}"


def _budget(experiment: Experiment, options: argparse.Namespace) -> Budget:
    default = experiment.cpu if options.scale == "cpu" else experiment.full
    if default is None:
        raise ValueError(f"{experiment.name} has no preset for a CPU: leave --scale away")
    if options.quick:
        default = experiment.quick
    given = {key: getattr(options, key) for key in ("seeds", "batch", "items")}
    if options.iterations or options.epochs:
        default = replace(default, iterations=options.iterations, epochs=options.epochs)
    return replace(default, **{key: value for key, value in given.items() if value is not None})


def _report(experiment: Experiment, store: Store) -> None:
    table = experiment.table(store)
    text = report.markdown(table)
    print(f"\n{text}")
    path = store.path.with_suffix(".md")
    write_atomically(path, lambda file: file.write(text.encode()))
    picture = experiment.plot(store, store.path.with_suffix(".png"))
    for written in (store.path, path, picture):
        print(written)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, given {value}")
    return value
