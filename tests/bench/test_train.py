"""The training runner: models, runs reproducible, resumes bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import bench_packages  # noqa: F401
import pytest
import torch
from torch import nn

from bench import config as configs
from bench import models
from bench import train as runner
from bench.config import Config
from bench.data import Data, load
from bench.record import Result, write_atomically
from bench.trainer import Task

QUICK = Config(steps=20, batch=16, model="mlp", eval_every=5, monitor_every=4)


def same_bits(a: object, b: object) -> bool:
    """Equality of checkpoint contents: torch.equal in nested containers."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return (
            isinstance(b, dict)
            and a.keys() == b.keys()
            and all(same_bits(a[key], b[key]) for key in a)
        )
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


# --- models and optimizers ---


@pytest.mark.parametrize("name", models.MODELS)
def test_models_are_a_function_of_their_seed(name: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (models.build(name, (1, 28, 28), 10, seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert first(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    if name != "lenet":  # too small for two 5x5 convolutions, and it says so
        assert models.build(name, (3, 9, 33), 7, 0)(torch.zeros(2, 3, 9, 33)).shape == (2, 7)
    else:
        with pytest.raises(ValueError, match="at least 16x16"):
            models.build(name, (1, 8, 8), 10, 0)
    for (key, p), q, r in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(p, q)
        assert torch.equal(p, r) == key.endswith("bias")  # biases start at 0, kernels are drawn


def test_lenet_is_caffes() -> None:
    lenet = models.build("lenet", (1, 28, 28), 10, 0)
    assert sum(p.numel() for p in lenet.parameters()) == 431_080
    for p in lenet.parameters():
        if p.ndim >= 2:  # uniform in +-sqrt(3/fan_in)
            bound = math.sqrt(3 / p[0].numel())
            assert 0.95 * bound < p.abs().max() <= bound


def test_alpha_gives_each_kernel_and_its_bias_a_rate() -> None:
    model = models.build("convnet", (1, 8, 8), 10, 0)
    optimizer = configs.build_optimizer(replace(QUICK, rule="layca", alpha=0.2), model)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 2, 2]
    scales = [group["lr_factor"] for group in optimizer.param_groups]
    assert scales == pytest.approx([0.8 ** (5 * (3 - layer) / 3) for layer in range(4)])


def test_options_reach_the_optimizer_and_the_rule() -> None:
    chosen = replace(
        QUICK,
        optimizer="adam",
        rule="layca",
        options=("betas=(0.8, 0.9)",),
        rule_options=("radius=current",),
        weight_decay=0.5,
    )
    group = configs.build_optimizer(chosen, nn.Linear(2, 2)).param_groups[0]
    assert group["betas"] == (0.8, 0.9) and group["weight_decay"] == 0.5
    assert group["rule"].radius == "current"
    assert group["lr"] == 3.0**-5
    with pytest.raises(ValueError, match="momentum"):
        configs.build_optimizer(replace(chosen, momentum=0.9), nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"optimizer": "sdg"}, "unknown optimizer 'sdg'; there are: sgd"),
        ({"library": "torch", "rule": "singh"}, "no layer rules"),
        ({"rule": "lars"}, "no default learning rate"),
        ({"rule": "larks", "lr": 0.1}, "larks"),
        ({"rule": "larks", "lr": 0.1, "rule_options": ("eps=1",)}, "larks"),
        ({"rule_options": ("eps=1",)}, "without a rule"),
        ({"rule": "layca", "rule_options": ("speed=1",)}, "speed"),
        ({"options": ("betas",)}, "not KEY=VALUE"),
    ],
)
def test_wrong_choices_are_answered(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configs.build_optimizer(replace(QUICK, **wrong), nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 1.0, 99: 1.0}),
        ("steps", {0: 1.0, 79: 1.0, 80: 0.2, 90: 0.04, 97: 0.008, 99: 0.008}),
        ("cosine", {0: 1.0, 50: 0.5, 100: 0.0}),
        ("inv", {0: 1.0, 100: 1.01**-0.75}),
    ],
)
def test_schedules(schedule: str, expected: dict[int, float]) -> None:
    chosen = replace(QUICK, schedule=schedule, steps=100)
    assert [chosen.factor(step) for step in expected] == pytest.approx(list(expected.values()))


# --- runs ---


def test_a_bare_run_is_that_of_torch() -> None:
    ours = runner.train(replace(QUICK, optimizer="nag"))
    theirs = runner.train(replace(QUICK, optimizer="nag", library="torch"))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert ours.losses[-1] < 0.5 * ours.losses[0]
    assert ours.losses != runner.train(replace(QUICK, optimizer="nag", seed=1)).losses


RESUMED = {
    "sgd-layca": {"optimizer": "sgd", "rule": "layca"},
    "adam": {"optimizer": "adam"},
    "nag-singh-alpha": {"optimizer": "nag", "rule": "singh", "alpha": -0.3, "layers": "module"},
}


@pytest.mark.parametrize("case", RESUMED)
def test_resume_is_bit_exact(tmp_path: Path, case: str) -> None:
    chosen = replace(QUICK, **RESUMED[case])
    checkpointed = replace(chosen, checkpoint_every=20)
    straight = runner.train(checkpointed, out=tmp_path / "straight")
    half = runner.train(chosen, out=tmp_path / "cut", stop=10)
    saved = tmp_path / "cut" / f"{chosen.name}.pt"
    assert half.final["complete"] is False and len(half.losses) == 10
    torch.rand(3)  # whatever the process drew in between must not matter
    resumed = runner.train(checkpointed, out=tmp_path / "cut", resume=saved)

    assert resumed.final["complete"] and resumed.losses == straight.losses
    assert resumed.rotation == straight.rotation and resumed.rates == straight.rates
    timeless = [[{**r, "seconds": 0} for r in run.records] for run in (straight, resumed)]
    assert timeless[0] == timeless[1]
    ends = [
        torch.load(tmp_path / folder / f"{chosen.name}.pt", weights_only=True)
        for folder in ("straight", "cut")
    ]
    assert ends[0]["step"] == 20
    for part in ("model", "optimizer", "scheduler", "monitor", "stats", "rng"):
        assert same_bits(ends[0][part], ends[1][part]), part


def test_dropout_goes_on_where_it_was(tmp_path: Path) -> None:
    data = load("digits")

    def task() -> Task:
        torch.manual_seed(0)
        return Task(data, nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)))

    straight = runner.train(QUICK, task())
    runner.train(QUICK, task(), out=tmp_path, stop=7)
    resumed = runner.train(QUICK, task(), resume=tmp_path / f"{QUICK.name}.pt")
    assert resumed.losses == straight.losses


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    runner.train(QUICK, out=tmp_path, stop=5)
    with pytest.raises(ValueError, match=r"another run: lr was None, now 0\.5"):
        runner.train(replace(QUICK, lr=0.5), resume=tmp_path / f"{QUICK.name}.pt")


class Hostile:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("executed"),))


def test_a_bad_checkpoint_is_named_and_executes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.pt"
    runner.train(QUICK, out=tmp_path, stop=5)
    whole = (tmp_path / f"{QUICK.name}.pt").read_bytes()
    torch.save({"config": Hostile()}, bad)
    hostile = bad.read_bytes()
    torch.save([1, 2], bad)
    for content in (hostile, whole[:-1000], b"", b"text", bad.read_bytes()):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.pt: not a .*checkpoint of this runner"):
            runner.train(QUICK, resume=bad)
    assert not (tmp_path / "executed").exists()


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    write_atomically(path, lambda file: file.write(b"old"))

    def full_disk(file: object) -> None:
        file.write(b"half of the ne")  # type: ignore[attr-defined]
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, full_disk)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_diverged_run_says_so(tmp_path: Path) -> None:
    counted: list[int] = []
    chosen = replace(QUICK, lr=1e12, steps=200)
    result = runner.train(chosen, out=tmp_path, after_step=counted.append)
    assert result.final["diverged"] and not result.final["complete"]
    assert len(result.losses) == sum(counted) < 200
    read = Result.load(tmp_path / f"{chosen.name}.json")
    assert read.losses[-1] is None and read.final["test_error"] > 0.5


def test_a_task_of_its_own_and_the_callers_settings() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator)
    y = x @ torch.tensor([[1.0, 2.0], [-2.0, 1.0], [0.5, -1.0]])
    task = Task(Data("line", x, y, x, y, 2), nn.Linear(3, 2), nn.functional.mse_loss, None)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    result = runner.train(replace(QUICK, lr=0.3, steps=60, threads=2), task)
    assert result.final["test_loss"] < 1e-4 and "test_error" not in result.final
    assert torch.equal(before, torch.get_rng_state()) and torch.get_num_threads() == threads
