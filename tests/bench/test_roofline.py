"""The roofline: bytes that cannot be saved, shares of a copy's bandwidth, its files."""

import json

import pytest
import torch

from bench import goals, report, roofline
from bench.timing import Spread


def row(**changed):
    seconds = changed.pop("seconds", 1e-3)
    facts = {
        "model": "resnet50",
        "tensors": 161,
        "parameters": 10_000_000,
        "dtype": "float32",
        "family": "sgd",
        "contender": "layerlr SGD layca",
        "package": "layerlr",
        "rule": "layca",
        "seconds": Spread(seconds, seconds, seconds),
        "ratio": None,
        "bytes_per_param": 28,
        "gb_per_s": None,
        "of_stream": None,
        "us_per_tensor": None,
        "rounds": 9,
        "steps_per_sample": 1,
        "backend": "cuda",
        "once_bytes_per_param": 20,
    }
    return report.Row(**facts | changed)


COPY = row(contender="memory copy", package="memory", gb_per_s=400.0, once_bytes_per_param=None)


@pytest.mark.parametrize(
    "dtype, sgd, adam",
    [
        (
            torch.float32,
            [(20, 20), (20, 24), (20, 28), (20, 28)],
            [(28, 28), (28, 32), *[(28, 40)] * 2],
        ),
        # Weights and gradients take two bytes, state four.
        (
            torch.bfloat16,
            [(14, 14), (14, 16), (14, 18), (14, 20)],
            [(22, 22), (22, 24), *[(22, 32)] * 2],
        ),
        (
            torch.float64,
            [(40, 40), (40, 48), (40, 56), (40, 56)],
            [(56, 56), (56, 64), *[(56, 80)] * 2],
        ),
    ],
)
def test_compulsory_bytes(dtype, sgd, adam):
    found = roofline.compulsory(dtype)
    assert [line[:2] for line in found] == [
        *(("sgd", rule) for rule in (None, "singh", "lars", "layca")),
        *(("adam", rule) for rule in (None, "singh", "layca", "lamb")),
    ]
    assert [line[2:] for line in found] == [*sgd, *adam]


def test_points_are_shares_of_the_copy():
    reference = row(
        contender="layerlr SGD layca reference", backend="reference", bytes_per_param=None
    )
    again = row(contender="torch SGD fused (A/A)", package="torch", backend=None)
    tiny, peer = row(parameters=9600), row(package="timm", once_bytes_per_param=None)
    content = roofline.analyse(report.Result({}, [COPY, row(), reference, again, tiny, peer]))
    assert content["copy_gb_per_s"] == 400.0
    ours, slow = content["points"]
    # 10 M parameters in a millisecond: 200 GB/s at 20 bytes, 280 at 28.
    assert (ours["once"], ours["two_pass"]) == (pytest.approx(0.5), pytest.approx(0.7))
    assert (slow["backend"], slow["two_pass"]) == ("reference", None)
    assert goals.copy_speed([row()]) is None
    assert goals.of_copy(row(), None, once=True) is None


def test_a_run_without_a_copy_needs_a_device():
    with pytest.raises(ValueError, match="memory copy"):
        roofline.analyse(report.Result({}, [row()]))
    content = roofline.analyse(report.Result({}, [row()]), torch.device("cpu"))
    assert content["copy_gb_per_s"] > 0


def test_quick_on_a_cpu(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots are drawn with matplotlib")
    out, picture = tmp_path / "roofline.json", tmp_path / "roofline.png"
    assert roofline.main(["--quick", "--out", str(out), "--plot", str(picture)]) == 0
    content = json.loads(out.read_text())
    assert set(content) == {"schema", "machine", "copy_gb_per_s", "bytes", "points"}
    found = {(p["family"], p["rule"], p["backend"]) for p in content["points"]}
    assert found >= {("sgd", "layca", "cpu"), ("adam", "lamb", "cpu"), ("sgd", None, "torch")}
    assert all(0 < p["once"] <= p["two_pass"] for p in content["points"])
    assert ["float32", "adam", "lamb", 28, 40] in content["bytes"]
    assert picture.stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "l2 adam" in printed and "GB/s" in printed


def test_without_matplotlib_it_says_so(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run.json"
    report.write(run, report.Result({"cpu": "a CPU", "torch": "2"}, [COPY, row()]))
    monkeypatch.setitem(__import__("sys").modules, "bench.plot_roofline", None)
    assert roofline.main([str(run), "--plot", str(tmp_path / "roofline.png")]) == 0
    assert "no plot drawn" in capsys.readouterr().out
