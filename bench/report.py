"""What the step-time benchmark says: its rows, table, machine facts and files."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.timing import Spread

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One contender on one model."""

    model: str
    tensors: int
    parameters: int
    dtype: str
    family: str
    contender: str
    package: str
    rule: str | None
    seconds: Spread  # per step
    ratio: Spread | None  # to the family's baseline in the same round; None for memory streams
    bytes_per_param: int | None  # by design; None where it is not known
    gb_per_s: float | None  # those bytes over the median
    of_stream: float | None  # gb_per_s over that of a stream over memory in the same run
    us_per_tensor: float | None
    rounds: int
    steps_per_sample: int
    backend: str | None = None  # of layerlr
    once_bytes_per_param: int | None = None  # the least that any implementation moves
    host_seconds: Spread | None = None  # of the call, where a device does the work
    extra_bytes: int | None = None  # of the GPU's memory that a step takes for a while
    interleaved: bool = True  # False: contenders ran one after the other, for want of memory


@dataclass
class Result:
    """A whole run."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # "model: contender": why


def machine_facts(device: torch.device, clock: str, command: Sequence[str]) -> dict[str, Any]:
    """What a figure must be read with; no names of hosts, users or folders."""
    return {
        **record.machine(device),
        **(_gpu_facts(device) if device.type == "cuda" else {}),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "transparent_hugepages": _huge_pages(),
        "load_before": round(os.getloadavg()[0], 2),
        "clock": clock,
        "commit": _commit(),
        "command": " ".join(command),
        "timm": _version("timm"),
        "pytorch_optimizer": _version("pytorch_optimizer"),
    }


def _gpu_facts(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
    }


def _huge_pages() -> str | None:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or None


def _commit() -> str | None:
    """The checkout's commit, with a + when the tree differs from it; of a copy, BENCH_COMMIT."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        run = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCH_COMMIT")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(rows: Sequence[Row], markdown: bool = False) -> str:
    """The rows of one model as text, families apart, fastest first within a family."""
    head = "ms/step ratio 20-80% us/tensor host~us host~us/tensor extra~KiB B/param GB/s of~stream"
    lines = [("", *(word.replace("~", " ") for word in head.split()))]
    for family in dict.fromkeys(row.family for row in rows):
        lines.append(("",) * len(lines[0]))
        mine = [row for row in rows if row.family == family]
        lines += [_cells(row) for row in sorted(mine, key=_rank)]
    text = columns(lines, markdown)
    if all(row.interleaved for row in rows):
        return text
    return f"{text}\n\none after the other, not in turn: too large to hold side by side"


def columns(lines: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Lines, the first of them the head, as a table; columns that hold nothing are left out."""
    kept = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    widths = [max(len(line[i]) for line in lines) for i in kept]
    text = []
    for line in lines:
        if markdown and not any(line[1:]):
            continue  # what sets families apart
        first, *rest = (line[i].rjust(width) for i, width in zip(kept, widths, strict=True))
        cells = [first.strip().ljust(widths[0]), *rest]
        text.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
    if markdown:
        text.insert(1, "|---" + "|--:" * (len(kept) - 1) + "|")
    return "\n".join(text)


NOT_INSTALLED = " is not installed"


def left_out(result: Result) -> list[str]:
    """A line for each contender and reason, with the models it was left out of.

    Packages that are not installed share one line.
    """
    models: dict[tuple[str, str], list[str]] = {}
    packages: dict[str, None] = {}
    for place, reason in result.left_out.items():
        if reason.endswith(NOT_INSTALLED):
            packages[reason.removesuffix(NOT_INSTALLED)] = None
            continue
        model, _, name = place.partition(": ")
        models.setdefault((name, reason), []).append(model)
    lines = [
        f"left out {name} ({'; '.join(where)}): {reason}"
        for (name, reason), where in models.items()
    ]
    if packages:
        lines.append(
            "optional packages, whose optimizers are compared only where they are installed, "
            f"and here are not: {', '.join(packages)}"
        )
    return lines


def _rank(row: Row) -> tuple[bool, float]:
    return row.package == "memory", row.seconds.median


def _cells(row: Row) -> tuple[str, ...]:
    def show(value: float | None, form: str, scale: float = 1.0) -> str:
        return "" if value is None else format(value * scale, form)

    ratio, host = row.ratio, row.host_seconds and row.host_seconds.median
    return (
        row.contender,
        f"{row.seconds.median * 1e3:.3f}",
        "" if ratio is None else f"{ratio.median:.3f}",
        "" if ratio is None else f"{ratio.q20:.2f}-{ratio.q80:.2f}",
        show(row.us_per_tensor if row.parameters < 1e6 and host is None else None, ".3f"),
        show(host, ".1f", 1e6),
        show(host, ".3f", 1e6 / row.tensors),
        show(row.extra_bytes, ".1f", 1 / 1024),
        show(row.bytes_per_param, ".0f"),
        show(row.gb_per_s, ".1f"),
        show(row.of_stream, ".0%"),
    )


def write(path: Path, result: Result) -> None:
    """To ``path``: everything as JSON, or the rows and the machine as CSV, by its suffix."""
    if path.suffix == ".json":
        text = json.dumps({"schema": SCHEMA, **rounded(asdict(result))}, indent=1) + "\n"
    else:
        file = io.StringIO()
        out = csv.writer(file)
        out.writerow([*_flat_names(), *result.machine])
        out.writerows([*_flat(row), *result.machine.values()] for row in result.rows)
        text = file.getvalue()
    record.write_atomically(path, lambda file: file.write(text.encode()))


def read(path: Path) -> Result:
    """What `write` wrote as JSON."""
    content = json.loads(path.read_text())
    rows = [
        Row(**{key: Spread(**v) if key in SPREADS and v else v for key, v in row.items()})
        for row in content["rows"]
    ]
    return Result(content["machine"], rows, content["verdicts"], content["left_out"])


def rounded(value: Any) -> Any:
    """Five digits: more than a timing knows, and files that can be read."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


SPREADS = ("seconds", "ratio", "host_seconds")
PARTS = ("median", "q20", "q80")


def _flat_names() -> list[str]:
    names: list[str] = []
    for f in fields(Row):
        names += [f"{f.name}_{part}" for part in PARTS] if f.name in SPREADS else [f.name]
    return names


def _flat(row: Row) -> list[Any]:
    values: list[Any] = []
    for f in fields(Row):
        value = getattr(row, f.name)
        if f.name in SPREADS:
            values += [None if value is None else rounded(getattr(value, p)) for p in PARTS]
        else:
            values.append(rounded(value))
    return values
