"""What a run's JSON says of one promise: medians and quantiles by name (`bench.promises`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

SGD = ("layerlr SGD singh", "layerlr SGD lars", "layerlr SGD layca")
ADAM = ("layerlr Adam singh", "layerlr Adam layca", "layerlr AdamW lamb")
BARE = ("layerlr SGD None", "layerlr AdamW None")
TINY = ("tiny128", "tiny300", "tiny1500")


class Spread(NamedTuple):
    """A median between its quantiles."""

    low: float
    median: float
    high: float


Figures = dict[str, Spread]


def _spread(quantiles: Mapping[str, float]) -> Spread:
    return Spread(quantiles["q20"], quantiles["median"], quantiles["q80"])


def _rows(content: Any, dtype: str) -> list[Any]:
    return [row for row in content["rows"] if row["dtype"] == dtype and row.get("ratio")]


def steps(names: Sequence[str], dtype: str, models: Sequence[str] = ()) -> Callable[[Any], Figures]:
    """Times of contenders over torch's fused step, on all models but the tiny ones, or on some."""

    def of(content: Any) -> Figures:
        return {
            f"{row['model']}, {row['contender'].removeprefix('layerlr ')}": _spread(row["ratio"])
            for row in _rows(content, dtype)
            if row["contender"] in names
            and (row["model"] in models if models else row["model"] not in TINY)
        }

    return of


def beside_peers(dtype: str) -> Callable[[Any], Figures]:
    """Time of our LARS and LAMB over that of the fastest of the others'."""

    def of(content: Any) -> Figures:
        found, rows = {}, _rows(content, dtype)
        for ours, rule in (("layerlr SGD lars", "lars"), ("layerlr AdamW lamb", "lamb")):
            for row in rows:
                peers = [
                    _spread(peer["ratio"])
                    for peer in rows
                    if (peer["model"], peer["rule"]) == (row["model"], rule)
                    and peer["package"] != "layerlr"
                ]
                if row["contender"] == ours and row["model"] not in TINY and peers:
                    mine, best = _spread(row["ratio"]), min(peers, key=lambda peer: peer.median)
                    found[f"{row['model']}, {rule}"] = Spread(
                        mine.low / best.high, mine.median / best.median, mine.high / best.low
                    )
        return found

    return of


def host(content: Any) -> Figures:
    """Host time of a step over 300 tiny tensors, over that of torch's fused step."""
    rows = {row["contender"]: row for row in content["rows"] if row["model"] == "tiny300"}
    found = {}
    for names, other in ((SGD, "torch SGD fused"), (ADAM, "torch AdamW fused")):
        theirs = _spread(rows[other]["host_seconds"])
        for name in names:
            mine = _spread(rows[name]["host_seconds"])
            found[name.removeprefix("layerlr ")] = Spread(
                mine.low / theirs.high, mine.median / theirs.median, mine.high / theirs.low
            )
    return found


def messages(content: Any) -> Figures:
    return {
        f"{count} parameters, {name.removeprefix('layerlr ')}": Spread(*3 * (row["messages"],))
        for count, rows in content["parameters"].items()
        for name, row in rows.items()
        if name.startswith("layerlr")
    }


def sharded(count: str) -> Callable[[Any], Figures]:
    return lambda content: {
        name.removeprefix("layerlr "): _spread(row["ratio"])
        for name, row in content["parameters"][count].items()
        if name.startswith("layerlr")
    }


def in_backward(content: Any) -> Figures:
    return {"time over the plain loop's": _spread(content["time"]["in backward"]["ratio"])}


def in_backward_memory(content: Any) -> Figures:
    held = {key: part["step"] for key, part in content["memory"].items()}
    return {"memory over the plain loop's": Spread(*3 * (held["in backward"] / held["plain"],))}
