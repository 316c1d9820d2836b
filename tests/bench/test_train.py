"""The training runner and the demo: data read right, runs reproducible, resumes bit for bit."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import bench_packages  # noqa: F401
import pytest
import torch
from data_folders import idx, mnist_folder
from torch import nn

from bench import config as configs
from bench import demo, models, step_time
from bench import train as runner
from bench.config import Config
from bench.data import Data, DataError, load, read_idx
from bench.record import Result, write_atomically
from bench.trainer import Batches, Task

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


# --- data ---


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("below", ["MNIST/raw", "raw", "."])
def test_mnist_is_read_from_each_layout(tmp_path: Path, below: str, zipped: bool) -> None:
    mnist_folder(tmp_path / below, zipped)
    data = load("mnist", tmp_path, scaling="unit")
    assert data.shape == (1, 28, 28) and len(data.x) == 6 and len(data.test_x) == 4
    assert data.y.tolist() == [0, 1, 2, 3, 4, 5]
    # Item 1, row 0, column 2 is byte 786 of the file: row-major, images one after another.
    assert data.x[1, 0, 0, 2].item() == (786 % 251) / 256
    standard = load("mnist", tmp_path)
    assert standard.x.mean().abs() < 1e-5 and abs(standard.x.std(correction=0) - 1) < 1e-5
    # The test set is scaled by the train set's figures.
    expected = (data.test_x * 256 - standard.meta["mean"]) / standard.meta["std"]
    torch.testing.assert_close(standard.test_x, expected)


GOOD = idx((6, 28, 28), bytes(6 * 784))
BAD_FILES = {
    "magic": ("train_images", idx((6, 28, 28), bytes(6 * 784), b"\x00\x00\x0d\x03"), "begins"),
    "not idx": ("train_images", b"<html>not found</html>", "not an idx file"),
    "empty": ("train_labels", b"", "not an idx file"),
    "header": ("train_images", GOOD[:9], "truncated within the header"),
    "truncated": ("train_images", GOOD[:-1], "promises 4704 bytes, the file holds 4703"),
    "too long": ("train_images", GOOD + b"\x00", "too long"),
    "giant": ("t10k_images", idx((2**32 - 1, 2**32 - 1, 28), bytes(99)), "holds 99"),
    "no items": ("t10k_labels", idx((0,), b""), "no items"),
    "shape": ("train_images", idx((6, 14, 14), bytes(6 * 196)), r"\(14, 14\)"),
    "counts": ("train_labels", idx((5,), bytes(5)), "5 labels for 6 images"),
    "label": ("t10k_labels", idx((4,), bytes((1, 2, 10, 3))), "label 10 at item 2"),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_bad_file_is_named(tmp_path: Path, case: str, zipped: bool) -> None:
    which, content, message = BAD_FILES[case]
    mnist_folder(tmp_path, zipped, **{which: content})
    with pytest.raises(DataError, match=message) as caught:
        load("mnist", tmp_path)
    assert which.replace("_", "-") in str(caught.value)


def test_a_damaged_gzip_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(GOOD)
    flipped = whole[:14] + bytes((whole[14] ^ 0xFF,)) + whole[15:]
    for content in (whole[:-12], flipped, b"plain text"):
        path = tmp_path / "train-images-idx3-ubyte.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
            read_idx(path, 3)


def test_folders_and_names_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no train-images-idx3-ubyte\[.gz\] in .*MNIST/raw"):
        load("mnist", tmp_path)
    with pytest.raises(DataError, match="needs a folder"):
        load("mnist")
    with pytest.raises(DataError, match="take no folder"):
        load("digits", tmp_path)
    with pytest.raises(DataError, match="there are: digits, mnist"):
        load("letters")


def test_digits_split_is_fixed() -> None:
    data = load("digits")
    assert data.x.shape == (1200, 1, 8, 8) and data.test_x.shape == (597, 1, 8, 8)
    assert data.x.mean().abs() < 1e-6 and abs(data.x.std(correction=0) - 1) < 1e-6
    assert data.y[:10].tolist() == list(range(10))
    assert data.test_y[-5:].tolist() == [9, 0, 8, 9, 8]
    assert data.y.bincount().tolist() == [119, 121, 117, 121, 120, 123, 120, 118, 119, 122]
    unit = load("digits", scaling="unit")
    assert unit.x.min() == 0 and unit.x.max() == 1


def test_holdout_is_taken_from_the_train_set() -> None:
    data = load("digits")
    held = data.holdout(0.25)
    assert torch.equal(torch.cat([held.x, held.test_x]), data.x)
    assert torch.equal(torch.cat([held.y, held.test_y]), data.y)
    assert len(held.test_x) == 300


def test_batches_visit_every_item_once_an_epoch() -> None:
    batches = Batches(10, 3, seed=1, device=torch.device("cpu"))
    epoch = torch.cat([batches(step) for step in range(3)])
    assert epoch.unique().numel() == 9
    assert not torch.equal(epoch, torch.cat([batches(step) for step in range(3, 6)]))
    assert torch.equal(epoch[:3], batches(0))  # back again: no hidden state
    assert not torch.equal(batches(0), Batches(10, 3, 2, torch.device("cpu"))(0))
    assert len(Batches(10, 64, 0, torch.device("cpu"))(5)) == 10  # a small set is one batch


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


# --- command lines ---

TINY = ["--steps", "6", "--model", "mlp", "--optimizer", "adam", "--rule", "layca"]


def test_help_shows_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        runner.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        "data",
        "folder",
        "model",
        "optimizer",
        "rule",
        "alpha",
        "schedule",
        "steps",
        "seeds",
        "device",
        "out",
        "resume",
        "weight-decay",
        "backend",
    ):
        assert f"--{flag} " in text


def test_command_line_run_stop_and_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path)]
    (straight,) = runner.main([*TINY, "--out", str(tmp_path / "straight")])
    stopped = runner.main([*TINY, *out, "--seeds", "0", "1", "--stop", "3"])
    assert [r.final["steps"] for r in stopped] == [3, 3]
    resumed = runner.main([*TINY, *out, "--seeds", "0", "1", "--resume"])
    assert [r.final["steps"] for r in resumed] == [6, 6]
    assert resumed[0].losses == straight.losses != resumed[1].losses
    written = json.loads((tmp_path / f"{straight.name}.json").read_text())
    assert written["config"]["lr"] == 3.0**-5 and written["machine"]["torch"] == torch.__version__
    assert (tmp_path / f"{straight.name}.png").read_bytes().startswith(b"\x89PNG")
    assert "over 2 seeds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "alexnet"], "invalid choice"),
        (["--rule", "larks", "--lr", "0.1"], "larks"),
        (["--data", "mnist"], "needs a folder"),
        (["--resume", "nowhere.pt"], "nowhere.pt"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        runner.main([*arguments, "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# --- the demo ---


def made(error: float, rule: str, lr: float = 0.1) -> Result:
    final = {"test_error": error, "diverged": False, "train_loss": 0.5, "step_ms": 1.0}
    return Result(rule, {"lr": lr}, final | {"optimizer_ms": 0.25})


def test_table_and_verdict() -> None:
    rows = [
        (
            "SGD",
            [
                ("none", [made(0.02, "none"), made(0.04, "none")]),
                ("layca", [made(0.01, "layca"), made(0.02, "layca")]),
            ],
        ),
        ("Adam", [("none", [made(0.01, "none")]), ("layca", [made(0.03, "layca")])]),
    ]
    text = demo.table(rows)
    assert "3.00 ± 1.41" in text and "SGD + layca" in text and "0.250" in text
    said = demo.verdict(rows)
    assert "on 1 of 2 directions" in said and "SGD -1.50" in said and "Adam +2.00" in said


def test_demo_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = (("SGD", "sgd", ("none", "singh", "layca")), ("Adam", "adam", ("none", "layca")))
    monkeypatch.setattr(demo, "PLAN", plan)
    monkeypatch.setattr(step_time, "quick", lambda: print("micro-benchmark"))
    demo.main(["--out", str(tmp_path), "--steps", "12", "--seeds", "0", "1", "--workers", "2"])
    text = capsys.readouterr().out
    assert text.endswith("micro-benchmark\n")
    for line in ("SGD + singh", "SGD + layca", "Adam + layca"):
        assert line in text
    for picture in ("loss.png", "rotation.png"):
        assert str(tmp_path / picture) in text
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "runs").glob("*.json"))) == 10
    # Twins start from the same weights and see the same images; processes change no bit.
    first = [Result.load(p).losses[0] for p in (tmp_path / "runs").glob("*seed0.json")]
    assert len(set(first)) == 1
    config = replace(demo.base_config(None, 12), optimizer="adam", rule="layca", seed=1)
    assert (
        runner.train(config).losses == Result.load(tmp_path / "runs" / f"{config.name}.json").losses
    )


def test_demo_answers_a_bad_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.main(["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path)])
    assert ended.value.code == 2 and "nowhere" in capsys.readouterr().err


def test_grid_looks_at_the_train_set_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "BARE_RATES", {"sgd": 0.1})
    monkeypatch.setattr(demo, "GRID", (1e-6, 0.1))
    data = load("digits")
    spoilt = replace(data, test_y=(data.test_y + 1) % 10)
    base = replace(demo.base_config(None, 60), model="mlp")
    found = demo.run_grid(base, spoilt, seeds=(0,))
    assert found["sgd"][0.1] < 20 < found["sgd"][1e-6]
    assert "sgd" in demo.grid_table(found)
