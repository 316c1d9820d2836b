"""Time of a step with `rule="curvature"` over that of plain SGD-momentum, on MNIST's autoencoder.

``python -m bench.papers.curvature_cost --data FOLDER``: forward, backward and step on batches of
1,000, all arms in turn in each round, so that other load meets them alike; medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from bench.config import Config
from bench.data import load
from bench.record import machine, write_atomically
from bench.trainer import Trainer

from .curvature_autoencoder import CURVATURES, task
from .report import markdown, table_of


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path("runs/papers"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    data = load("mnist", options.data, "unit").some(10 * options.batch)
    trainers = {}
    arms: dict[str, tuple[str, ...] | None] = {"plain": None, **CURVATURES}
    for name, rule in arms.items():
        config = Config(
            data="mnist",
            scaling="unit",
            optimizer="momentum",
            rule="none" if rule is None else "curvature",
            rule_options=rule or (),
            layers="module",
            lr=1e-4 if rule is None else 1.0,
            batch=options.batch,
            steps=1000,
            eval_every=0,
            monitor_every=0,
            device=options.device,
        )
        trainers[name] = Trainer(config, task(config, data))
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    # four steps a round: an estimate every four steps is in each
    for _ in tqdm(range(1 + options.rounds), unit="round"):
        for name, trainer in trainers.items():
            started = time.perf_counter()
            trainer.run(trainer.step + 4, None)
            if trainer.device.type == "cuda":
                torch.cuda.synchronize(trainer.device)
            seconds[name].append((time.perf_counter() - started) / 4)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    ratios = {name: value / medians["plain"] for name, value in medians.items()}
    rows = [[name, f"{1e3 * medians[name]:.0f}", f"{ratios[name]:.2f}"] for name in ratios]
    print(markdown(table_of(["step", "ms", "of plain SGD-momentum's"], rows)))
    record = {
        "command": "python -m bench.papers.curvature_cost --data FOLDER "
        f"--rounds {options.rounds} --batch {options.batch} --device {options.device}",
        "machine": machine(trainers["plain"].device),
        "batch": options.batch,
        "ratios": ratios,
        "seconds": seconds,
    }
    path = options.out / "curvature_cost.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(json.dumps(record, indent=1).encode()))
    return ratios


if __name__ == "__main__":
    main()
