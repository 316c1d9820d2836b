"""The goals for a GPU, over made-up runs."""

import re
from dataclasses import replace

import pytest
import torch

from bench import (
    goals,
    merge,
    peers,
    report,
    shapes,
    summary,
    timing,
)


def gpu_rows(slower=1.0, host_us=0.2, extra=0, leave_out=()):
    """A made-up run on a GPU that copies 4 TB/s and where ours reach 95% of it, over `slower`."""
    rows = []
    for model in shapes.DEFAULTS["cuda"]:
        _, tensors, count = shapes.MODELS[model]
        for family in peers.BASELINES:
            for c in peers.contenders(family, ["cuda"], "cuda"):
                if c.name in leave_out or model in leave_out:
                    continue
                once, two = (
                    c.once_bytes_per_param(torch.float32),
                    c.bytes_per_param(torch.float32),
                )
                moved = (once if model in goals.GPU_ONCE else two) or once or 100
                seconds = moved * count / (0.95 * 4e12)
                base = (20 if family == "sgd" else 28) * count / (0.95 * 4e12)
                if c.package == "layerlr":
                    seconds *= 20 if c.backend == "reference" else slower
                speed = 4000.0 if c.name == "memory copy" else None
                spread = timing.Spread(seconds, seconds, seconds)
                ratio = timing.Spread(*[seconds / base] * 3)
                host = timing.Spread(*[host_us * 1e-6 * tensors] * 3)
                rows.append(
                    report.Row(
                        *(model, tensors, count, "float32", family, c.name, c.package, c.rule),
                        *(spread, None if c.package == "memory" else ratio, two, speed, None),
                        *(None, 9, 1, c.backend, once, host, extra),
                    )
                )
    return rows


def parts(rows):
    """The word of each part's line."""
    found = goals.gpu_verdicts(rows)
    lines = [goals.summary(part, found) for part in goals.GPU_PARTS]
    assert all(line.startswith(f"goal ({part})") for part, line in zip("abcde", lines))
    return [line[9:].partition("  ")[0].strip() for line in lines]


def test_gpu_goals_met():
    assert parts(gpu_rows()) == ["met"] * 5
    found = goals.gpu_verdicts(gpu_rows())
    assert goals.lines(found) == [goals.summary(part, found) for part in goals.GPU_PARTS]
    # all are equally far from their bound
    assert re.search(r"40 met; worst: \w+ layerlr \w+ \w+, of the copy", goals.summary("a", found))


def test_gpu_goals_missed():
    assert parts(gpu_rows(slower=1.04)) == ["met", "MISSED", "met", "met", "met"]
    assert parts(gpu_rows(slower=1.5))[:3] == ["MISSED"] * 3
    assert parts(gpu_rows(host_us=0.31)) == ["met"] * 3 + ["MISSED", "met"]
    assert parts(gpu_rows(extra=2 << 20)) == ["met"] * 4 + ["MISSED"]
    found = goals.gpu_verdicts(gpu_rows(host_us=0.31))
    missed = [line for line in goals.lines(found) if line.startswith("MISSED")]
    assert len(missed) == 3 * len(goals.GPU_OURS)
    assert "0.310 <= 0.30" in missed[0]


def test_gpu_goals_not_measured():
    assert parts([]) == ["not measured"] * 5
    assert parts(gpu_rows(leave_out=goals.GPU_OURS)) == ["not measured"] * 5
    half = [replace(row, dtype="bfloat16") for row in gpu_rows()]
    assert parts(half) == ["not measured"] * 5, "the goals are stated for float32"
    assert parts(gpu_rows(leave_out=["llama3_8b_16of32"])) == ["met so far"] * 3 + [
        "met",
        "met so far",
    ]
    # A peer that is not there takes its comparison along, no more.
    found = goals.gpu_verdicts(gpu_rows(leave_out=["timm Lars foreach"]))
    assert goals.summary("c", found).startswith("goal (c) met so far")
    assert "27 met, 5 not measured" in goals.summary("c", found)


def test_gpu_limits_follow_the_bytes():
    limits = goals.GPU_RATIO_LIMITS
    assert limits["vit_b"]["layerlr SGD layca"] == 1.0
    assert limits["gpt2_xl"]["layerlr SGD layca"] == pytest.approx(1.05 * 1.4)
    assert limits["llama3_8b_16of32"]["layerlr AdamW lamb"] == pytest.approx(1.5)


def test_verdicts_from_a_file(tmp_path, capsys):
    out = tmp_path / "run.json"
    report.write(out, report.Result({"gpu": "a GPU", "cpu": "a CPU", "torch": "2"}, gpu_rows()))
    assert len(report.read(out).rows) == len(gpu_rows())
    goals.main([str(out)])
    printed = capsys.readouterr().out.splitlines()
    assert [line[:13] for line in printed] == [f"goal ({part}) met " for part in "abcde"]
    goals.main([str(tmp_path / "missing.json")])
    assert capsys.readouterr().out.count("not measured") >= 5
    summary.main([str(out), str(tmp_path / "run.md")])
    page = (tmp_path / "run.md").read_text()
    assert "### llama3_8b_16of32, float32" in page and "The copy moves 4,000 GB/s." in page


def test_runs_merge(tmp_path, capsys):
    rows, paths = gpu_rows(), []
    for model in shapes.DEFAULTS["cuda"]:
        paths.append(tmp_path / f"{model}.json")
        mine = [row for row in rows if row.model == model]
        report.write(paths[-1], report.Result({"gpu": "a GPU", "command": model}, mine))
    merge.main([*map(str, paths), "--out", str(tmp_path / "all.json")])
    result = report.read(tmp_path / "all.json")
    assert len(result.rows) == len(rows)
    assert result.machine["command"].startswith("resnet50; vit_b; ")
    printed = capsys.readouterr().out
    assert printed.count("goal (") == printed.count(" met ") == 5
    (line,) = [x for x in printed.splitlines() if x.startswith("layerlr SGD layca  ")]
    assert line.split()[3:6] == ["0.135", "1.00", "95%"]
    again = merge.merge([result, replace(result, rows=[replace(rows[0], rounds=77)])])
    assert len(again.rows) == len(rows) and again.rows[0].rounds == 77
