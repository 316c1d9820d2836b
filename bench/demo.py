"""The main job: what do layer rules change? ``python -m bench.demo [--data DIR] [--out DIR]``.

Trains a small convolutional network on real handwritten digits with each direction, bare and
under the layer rules of the papers, the same budget of steps for all, and prints a table.

How the rates were chosen. Every bare direction has the best of nine rates (``--grid`` runs them
again; the outcome stands beside `BARE_RATES`), judged on a part of the *train* set, on this
schedule. Singh takes its bare twin's rate, as in its paper; Layca its paper's: 3^-3, or 3^-5 on
averaged momentum and Adam. Nothing of the two rules was tuned here. The schedule, three late drops
by 5, is that of the Layca paper.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from tqdm import tqdm

from . import plot
from .config import BARE_RATES, Config
from .data import Data, DataError, load
from .record import Result, cpu_name, write_atomically
from .train import train
from .trainer import Task

# title, direction, the rules that the two papers put on it
PLAN: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("SGD", "sgd", ("none", "singh", "layca")),
    ("NAG", "nag", ("none", "singh")),
    ("Averaged momentum", "amom", ("none", "layca")),
    ("Adagrad", "adagrad", ("none", "singh", "layca")),
    ("RMSprop", "rmsprop", ("none", "layca")),
    ("Adam", "adam", ("none", "layca")),
)
SEEDS = (0, 1, 2)
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)

Rows = list[tuple[str, list[tuple[str, list[Result]]]]]


def base_config(folder: str | None, steps: int = 500) -> Config:
    """The run that all variants share."""
    name = "digits" if folder is None else "mnist"
    return Config(data=name, folder=folder, steps=steps, eval_every=0)


def run_plan(
    base: Config,
    plan: Iterable[tuple[str, str, tuple[str, ...]]],
    seeds: Sequence[int] = SEEDS,
    out: Path | None = None,
    workers: int = 1,
) -> Rows:
    """Train everything, `workers` runs at a time, under one progress bar."""
    plan = list(plan)
    configs = [
        replace(base, optimizer=optimizer, rule=rule, seed=seed)
        for _, optimizer, rules in plan
        for rule in rules
        for seed in seeds
    ]
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    with ProcessPoolExecutor(min(workers, len(configs)), spawn) as pool:
        trained = pool.map(partial(_train, out), configs)
        results = iter(list(tqdm(trained, total=len(configs), unit="run", dynamic_ncols=True)))
    return [
        (title, [(rule, [next(results) for _ in seeds]) for rule in rules])
        for title, _, rules in plan
    ]


def _train(out: Path | None, config: Config) -> Result:
    return train(config, Task.of(config, _data(config.data, config.folder)), out=out)


@cache
def _data(name: str, folder: str | None) -> Data:
    return load(name, folder)


def label(title: str, rule: str) -> str:
    return title if rule == "none" else f"{title} + {rule}"


def errors(results: Sequence[Result]) -> list[float]:
    return [100 * result.final["test_error"] for result in results]


def table(rows: Rows) -> str:
    """Test error and time per step, a line per variant."""
    lines = [("", "rate", "test error %", "train loss", "step ms", "optimizer ms")]
    for title, variants in rows:
        for rule, results in variants:
            spread = statistics.stdev(errors(results)) if len(results) > 1 else 0.0
            diverged = sum(r.final["diverged"] for r in results)
            lines.append(
                (
                    label(title, rule) + (f" ({diverged} diverged)" if diverged else ""),
                    f"{results[0].config['lr']:.4g}",
                    f"{statistics.mean(errors(results)):.2f} ± {spread:.2f}",
                    f"{statistics.mean(r.final['train_loss'] for r in results):.4f}",
                    f"{statistics.median(r.final['step_ms'] for r in results):.2f}",
                    f"{statistics.median(r.final['optimizer_ms'] for r in results):.3f}",
                )
            )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def verdict(rows: Rows) -> str:
    """How each rule did beside its bare twin, in a sentence a rule."""
    against: dict[str, list[tuple[str, float]]] = {}
    for title, variants in rows:
        mean = {rule: statistics.mean(errors(results)) for rule, results in variants}
        for rule in mean:
            if rule != "none":
                against.setdefault(rule, []).append((title, mean[rule] - mean["none"]))
    return "\n".join(
        f"{rule}: test error no higher than the bare twin's on "
        f"{sum(d <= 1e-9 for _, d in differences)} of {len(differences)} directions "
        f"({', '.join(f'{title} {d:+.2f}' for title, d in differences)} points)"
        for rule, differences in against.items()
    )


def run_grid(
    base: Config, data: Data, seeds: Sequence[int] = range(5)
) -> dict[str, dict[float, float]]:
    """Validation error in % of every bare direction at every rate, mean over the seeds."""
    base = replace(base, holdout=True, monitor_every=0)
    found: dict[str, dict[float, float]] = {}
    with tqdm(total=len(BARE_RATES) * len(GRID) * len(seeds), unit="run") as bar:
        for optimizer in BARE_RATES:
            for rate in GRID:
                results = []
                for seed in seeds:
                    config = replace(base, optimizer=optimizer, lr=rate, seed=seed)
                    results.append(train(config, Task.of(config, data)))
                    bar.update()
                found.setdefault(optimizer, {})[rate] = statistics.mean(errors(results))
    return found


def grid_table(found: dict[str, dict[float, float]]) -> str:
    lines = ["validation error %".ljust(20) + "".join(f"{rate:>9g}" for rate in GRID)]
    for optimizer, by_rate in found.items():
        lines.append(optimizer.ljust(20) + "".join(f"{by_rate[rate]:9.2f}" for rate in GRID))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--data", help="folder of MNIST (default: scikit-learn's digits)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="folder for what is written"
    )
    parser.add_argument("--steps", type=int, default=500, help="steps of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument(
        "--workers", type=int, default=min(4, os.cpu_count() or 1), help="runs at a time"
    )
    parser.add_argument("--grid", action="store_true", help="only the grid of bare rates")
    parser.add_argument("--no-bench", action="store_true", help="leave out the micro-benchmark")
    arguments = parser.parse_args(argv)
    try:
        base = base_config(arguments.data, arguments.steps)
        data = load(base.data, base.folder)
    except (DataError, ValueError) as error:
        parser.error(str(error))
    print(
        f"{data.name}: {len(data.x)} images to learn from, {len(data.test_x)} to test on; "
        f"{base.steps} steps of {base.batch}; {cpu_name()}, {arguments.workers} runs at a time"
    )
    if arguments.grid:
        print(grid_table(run_grid(base, data)))
        return
    rows = run_plan(base, PLAN, arguments.seeds, arguments.out / "runs", arguments.workers)
    text = f"{table(rows)}\n\n{verdict(rows)}\n"
    print(f"\n{text}")
    write_atomically(arguments.out / "table.txt", lambda file: file.write(text.encode()))
    for path in (
        arguments.out / "table.txt",
        plot.losses(rows, arguments.out / "loss.png"),
        plot.rotations(rows, arguments.out / "rotation.png"),
    ):
        print(path)
    if not arguments.no_bench:
        from . import step_time

        print(
            "\nThe optimizers' step alone on ResNet-50's weights, beside torch.optim and others.\n"
            "ratio: time over torch's fused step in the same round, median and 20-80% of rounds;\n"
            "B/param: bytes moved by design; of stream: share of memory's speed.\n"
            "More: bench/README.md.\n"
        )
        step_time.quick()


if __name__ == "__main__":
    main()
