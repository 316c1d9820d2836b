"""The speeds that layerlr's engines are held to, and the verdict on each from a run's rows.

python -m bench.goals RUN.json          the verdicts once more, from a file of bench.step_time
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.report import Row

Verdict = dict[str, Any]

# --- the C++ engine ---

# Ratios to torch's fused step. Two passes over memory cost 24/20, 28/20 and 40/28 of its bytes; the
# limits are those plus what a prototype needed; where a layer fits in L2 it is read once.
_LARGE = {
    "layerlr SGD None": 1.05,
    "layerlr SGD singh": 1.28,
    "layerlr SGD lars": 1.54,
    "layerlr SGD layca": 1.54,
    "layerlr AdamW None": 1.05,
    "layerlr Adam layca": 1.57,
    "layerlr AdamW lamb": 1.57,
}
_GPT2 = _LARGE | {
    "layerlr SGD lars": 1.60,
    "layerlr SGD layca": 1.60,
    "layerlr Adam layca": 1.63,
    "layerlr AdamW lamb": 1.63,
}
_L2 = _LARGE | {
    "layerlr SGD singh": 1.10,
    "layerlr SGD lars": 1.20,
    "layerlr SGD layca": 1.20,
    "layerlr Adam layca": 1.30,
    "layerlr AdamW lamb": 1.30,
}
RATIO_LIMITS = {"resnet50": _LARGE, "vit_b": _LARGE, "gpt2": _GPT2, "l2": _L2}
HOST_MODEL = "tiny300"
HOST_LIMIT_US = 0.2  # per parameter tensor
# rule: (ours, how many times faster than the fastest peer under the same rule)
PEER_FACTORS = {"lars": ("layerlr SGD lars", 1.0), "lamb": ("layerlr AdamW lamb", 3.0)}

# --- the CUDA engine: float32, device time by events, layerlr's backend "cuda" ---

GPU_PARTS = {
    "a": "at least 90% of the measured copy bandwidth",
    "b": "no slower than torch's fused step; where read twice, 5% above the ratio of bytes",
    "c": "3 times (2 where read twice) as fast as timm's foreach, 10 times as the reference",
    "d": "at most 0.3 us of host time per parameter tensor",
    "e": "a step allocates 1 MiB at most",
}
GPU_ONCE = ("resnet50", "vit_b")  # whose layers fit on the chip: memory is read once
GPU_TWICE = ("vit_l", "gpt2_xl", "llama3_8b_16of32")
GPU_TINY = ("tiny128", "tiny300", "tiny1500")
GPU_OF_COPY = 0.90
_GPU_TWICE_SGD, _GPU_TWICE_ADAM = 1.05 * 28 / 20, 1.05 * 40 / 28
GPU_RATIOS = {  # ours: the limit where memory is read once, and twice
    "layerlr SGD singh": (1.00, _GPU_TWICE_SGD),
    "layerlr SGD lars": (1.00, _GPU_TWICE_SGD),
    "layerlr SGD layca": (1.00, _GPU_TWICE_SGD),
    "layerlr Adam layca": (1.00, _GPU_TWICE_ADAM),
    "layerlr AdamW lamb": (1.00, _GPU_TWICE_ADAM),
}
GPU_RATIO_LIMITS = {
    model: {name: limits[model in GPU_TWICE] for name, limits in GPU_RATIOS.items()}
    for model in (*GPU_ONCE, *GPU_TWICE)
}
GPU_OURS = ("layerlr SGD None", "layerlr AdamW None", "layerlr Adam singh", *GPU_RATIOS)
GPU_PEERS = {"layerlr SGD lars": "timm Lars foreach", "layerlr AdamW lamb": "timm Lamb foreach"}
GPU_PEER_FACTORS = (3.0, 2.0)  # once, twice
GPU_REFERENCE_FACTOR = 10.0
GPU_REFERENCE_TWICE = (
    "layerlr SGD layca",
    "layerlr AdamW lamb",
)  # on large models it takes seconds
GPU_HOST_LIMIT_US = 0.3
GPU_EXTRA_LIMIT = 1.0  # MiB, whatever the model: a float of each layer, never a copy of a tensor


def _verdict(model: str, what: str, value: float | None, sign: str, limit: float) -> Verdict:
    met = None
    if value is not None:
        met = value <= limit if sign == "<=" else value >= limit
    return {"model": model, "goal": what, "value": value, "sign": sign, "limit": limit, "met": met}


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """One verdict per goal of every model that was run; ``met`` None: its contender was not."""
    result = []
    for model in dict.fromkeys(row.model for row in rows):
        by_name = {row.contender: row for row in rows if row.model == model}
        ratio = {name: row.ratio.median for name, row in by_name.items() if row.ratio}
        for name, limit in RATIO_LIMITS.get(model, {}).items():
            what = f"{name}, times torch's fused step"
            result.append(_verdict(model, what, ratio.get(name), "<=", limit))
        for rule, (name, factor) in PEER_FACTORS.items():
            peers = [
                row.ratio.median
                for row in by_name.values()
                if row.rule == rule and row.package != "layerlr" and row.ratio
            ]
            value = min(peers) / ratio[name] if peers and name in ratio else None
            what = f"{name}, times as fast as the fastest peer's {rule}"
            result.append(_verdict(model, what, value, ">=", factor))
        if model == HOST_MODEL:
            for name, row in by_name.items():
                if row.package == "layerlr":
                    what = f"{name}, us of host time per parameter"
                    result.append(_verdict(model, what, row.us_per_tensor, "<=", HOST_LIMIT_US))
    return result


def copy_speed(rows: Sequence[Row]) -> float | None:
    """GB/s of a large copy, reads plus writes: the highest of the medians over the models."""
    speeds = [r.gb_per_s for r in rows if r.contender == "memory copy" and r.gb_per_s]
    return max(speeds, default=None)


def of_copy(row: Row, copy: float | None, once: bool) -> float | None:
    """The share of the copy's speed, counted at the bytes of one reading or of two passes."""
    moved = row.once_bytes_per_param if once else row.bytes_per_param
    if not moved or not copy:
        return None
    return moved * row.parameters / row.seconds.median / 1e9 / copy


def gpu_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """A verdict for each part (`GPU_PARTS`), model and contender, measured or not."""
    return [{"part": part, **_verdict(*found)} for part, *found in _gpu(rows)]


def _gpu(rows: Sequence[Row]) -> Iterator[tuple[Any, ...]]:
    rows = [row for row in rows if row.dtype == "float32"]
    table = {(row.model, row.contender): row for row in rows}
    copy = copy_speed(rows)

    def ratio(model: str, name: str, to: str) -> float | None:
        """How many times the time of `name` that of `to` is."""
        mine, other = table.get((model, name)), table.get((model, to))
        return other.seconds.median / mine.seconds.median if mine and other else None

    for model in (*GPU_ONCE, *GPU_TWICE):
        once = model in GPU_ONCE
        for name in GPU_OURS:
            row = table.get((model, name))
            what = f"{name}, of the copy's speed at {'read-once' if once else 'two-pass'} bytes"
            yield "a", model, what, row and of_copy(row, copy, once), ">=", GPU_OF_COPY
        for name, limit in GPU_RATIO_LIMITS[model].items():
            row = table.get((model, name))
            value = row.ratio.median if row and row.ratio else None
            yield "b", model, f"{name}, times torch's fused step", value, "<=", limit
        for name, peer in GPU_PEERS.items():
            what = f"{name}, times as fast as {peer}"
            yield "c", model, what, ratio(model, name, peer), ">=", GPU_PEER_FACTORS[not once]
        for name in GPU_OURS if once else GPU_REFERENCE_TWICE:
            what, value = f"{name}, times as fast", ratio(model, name, f"{name} reference")
            yield "c", model, f"{what} as the reference", value, ">=", GPU_REFERENCE_FACTOR
    for model in (*GPU_TINY, *GPU_ONCE, *GPU_TWICE):
        for name in GPU_OURS:
            row = table.get((model, name))
            host = row and row.host_seconds and row.host_seconds.median / row.tensors * 1e6
            if model in GPU_TINY:
                yield "d", model, f"{name}, us of host time", host, "<=", GPU_HOST_LIMIT_US
            extra = None if row is None or row.extra_bytes is None else row.extra_bytes / 2**20
            yield "e", model, f"{name}, MiB allocated", extra, "<=", GPU_EXTRA_LIMIT


WORDS = {True: "met", False: "MISSED", None: "not measured"}


def line(verdict: Verdict) -> str:
    """For example ``met           resnet50  layerlr SGD singh, times ...: 1.21 <= 1.28``."""
    value = "-" if verdict["value"] is None else f"{verdict['value']:.3f}"
    bound = f"{verdict['sign']} {verdict['limit']:.2f}"
    return f"{WORDS[verdict['met']]:14}{verdict['model']:18} {verdict['goal']}: {value} {bound}"


def lines(found: Sequence[Verdict], every: bool = False) -> list[str]:
    """All verdicts; of the GPU's many only those that were missed, and a line for each part."""
    if not any("part" in verdict for verdict in found):
        return [line(verdict) for verdict in found]
    shown = [line(v) for v in found if every or v["met"] is False]
    return [*shown, *(summary(part, found) for part in GPU_PARTS)]


def summary(part: str, found: Sequence[Verdict]) -> str:
    """One line: met, missed or not measured, how often, and the figure nearest to its limit."""
    mine = [verdict for verdict in found if verdict["part"] == part]
    count = {met: sum(v["met"] is met for v in mine) for met in WORDS}
    measured = [verdict for verdict in mine if verdict["met"] is not None]
    word = WORDS[None] if not measured else WORDS[not count[False]]
    if count[True] and count[None] and not count[False]:
        word = "met so far"
    text = f"goal ({part}) {word:14}{GPU_PARTS[part]}: "
    text += ", ".join(f"{count[met]} {word.lower()}" for met, word in WORDS.items() if count[met])
    if not measured:
        return text
    worst = min(measured, key=_margin)
    return f"{text}; worst: {' '.join(line(worst)[14:].split())}"


def _margin(verdict: Verdict) -> float:
    value, limit = verdict["value"], verdict["limit"]
    return value / limit if verdict["sign"] == ">=" else limit / max(value, 1e-12)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.goals", description=__doc__.split("\n")[0])
    p.add_argument("run", type=Path, help="a .json of bench.step_time")
    p.add_argument("--all", action="store_true", help="every verdict, not the missed ones alone")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    # Read without torch or layerlr, so that there is an answer even where layerlr was not built.
    run = SimpleNamespace(machine=SimpleNamespace(gpu=None), rows=[])
    if args.run.is_file():
        run = json.loads(args.run.read_text(), object_hook=lambda item: SimpleNamespace(**item))
    found = (gpu_verdicts if hasattr(run.machine, "gpu") else verdicts)(run.rows)
    print("\n".join(lines(found, args.all)))


if __name__ == "__main__":
    main()
