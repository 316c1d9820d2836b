"""One training run, every choice open: ``python -m bench.train --help``.

`train(config)` is the runner that the demo and the experiments share. An experiment whose data,
network or loss is not in the registries hands in its own `Task`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from . import plot
from .config import Config, add_arguments, from_arguments
from .record import Result
from .trainer import Task, Trainer


@contextmanager
def settings(config: Config) -> Iterator[None]:
    """The run's threads and random state, and the caller's again afterwards."""
    threads = torch.get_num_threads()
    cudnn = torch.backends.cudnn
    cuda = [torch.device(config.device)] if config.device.startswith("cuda") else []
    with torch.random.fork_rng(devices=cuda), cudnn.flags(deterministic=True, benchmark=False):
        torch.set_num_threads(config.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def train(
    config: Config,
    task: Task | None = None,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    stop: int | None = None,
    after_step: Callable[[int], object] | None = None,
) -> Result:
    """Run `config` to its end, or to step `stop`.

    Parameters
    ----------
    out
        Folder for ``NAME.json`` and, every `checkpoint_every` steps and where `stop` cuts the run
        short, ``NAME.pt``.
    resume
        A checkpoint to go on from; the rest of the run has the bits of an uninterrupted one.
    after_step
        Called with 1 after each step, and once with the steps that a checkpoint saves: the
        `update` of a progress bar.
    """
    stop = config.steps if stop is None else min(stop, config.steps)
    if out is None and (config.checkpoint_every or stop < config.steps):
        raise ValueError("checkpoints need an output folder")
    with settings(config):
        trainer = Trainer(config, Task.of(config) if task is None else task)
        if resume is not None:
            trainer.resume(resume)
            if after_step is not None:
                after_step(trainer.step)
        while trainer.step < stop and not trainer.diverged:
            every = config.checkpoint_every or config.steps
            trainer.run(min(stop, (trainer.step // every + 1) * every), after_step)
            if out is not None and (config.checkpoint_every or trainer.step < config.steps):
                trainer.save(out / f"{config.name}.pt")
        result = trainer.result()
    if out is not None:
        result.save(out)
    return result


def main(argv: Sequence[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train",
        description="Train a network with any direction and layer rule of layerlr.",
        epilog="example: python -m bench.train --optimizer adam --rule layca --alpha -0.3",
    )
    add_arguments(parser, skip=("seed",))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for what is written")
    parser.add_argument(
        "--resume",
        nargs="?",
        type=Path,
        const=_OWN,
        help="go on from this checkpoint, or from each run's own in --out where there is one",
    )
    parser.add_argument("--stop", type=int, help="stop after this step, leaving a checkpoint")
    arguments = parser.parse_args(argv)
    try:
        configs = [from_arguments(arguments, seed=seed) for seed in arguments.seeds]
        if arguments.resume not in (None, _OWN) and len(configs) > 1:
            raise ValueError("one checkpoint, several seeds: give --resume no file")
        results = [_run(config, arguments) for config in configs]
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    _report(results)
    return results


_OWN = Path()


def _run(config: Config, arguments: argparse.Namespace) -> Result:
    out: Path = arguments.out
    resume = arguments.resume
    if resume == _OWN:
        resume = out / f"{config.name}.pt"
        if not resume.is_file():
            print(f"no checkpoint {resume}: starting {config.name} anew")
            resume = None
    with tqdm(total=config.steps, desc=config.name, unit="step", dynamic_ncols=True) as bar:
        result = train(config, out=out, resume=resume, stop=arguments.stop, after_step=bar.update)
    for path in (out / f"{config.name}.json", *plot.run(result, out)):
        print(path)
    return result


def _report(results: list[Result]) -> None:
    for result in results:
        final = result.final
        state = "diverged, " if final["diverged"] else ""
        error = f"{100 * final['test_error']:.2f}%" if "test_error" in final else "not measured"
        print(
            f"{result.name}: {state}test error {error} after {final['steps']} steps, "
            f"{final['seconds']:.1f} s"
        )
    errors = [100 * r.final["test_error"] for r in results if "test_error" in r.final]
    if len(errors) > 1:
        print(
            f"test error over {len(errors)} seeds: "
            f"{statistics.mean(errors):.2f} +- {statistics.stdev(errors):.2f}%"
        )


if __name__ == "__main__":
    main()
