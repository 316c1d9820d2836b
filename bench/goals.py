"""The speeds that layerlr's C++ engine is held to, and the verdict on each from a run's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.report import Row

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


def _verdict(model: str, what: str, value: float | None, sign: str, limit: float) -> dict[str, Any]:
    met = None
    if value is not None:
        met = value <= limit if sign == "<=" else value >= limit
    return {"model": model, "goal": what, "value": value, "sign": sign, "limit": limit, "met": met}


def verdicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
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


def line(verdict: dict[str, Any]) -> str:
    """For example ``met     resnet50  layerlr SGD singh, times ...: 1.21 <= 1.28``."""
    word = {True: "met", False: "MISSED", None: "not run"}[verdict["met"]]
    value = "-" if verdict["value"] is None else f"{verdict['value']:.3f}"
    bound = f"{verdict['sign']} {verdict['limit']:.2f}"
    return f"{word:8}{verdict['model']:10}{verdict['goal']}: {value} {bound}"
