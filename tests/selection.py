"""Which engine is asked which rows of the table; a pytest plugin that leaves out the others.

Rows are the cases of ``cases.py``. A test says by the mark ``asked`` where it differs from what is
said here: ``asked(triton=EVERY)``, or ``asked(triton=NONE)`` where an engine has no code of its own
for what the test asks. What is left out is not collected: it is no part of the table.
"""

from __future__ import annotations

import pytest
import torch

EVERY, NONE = None, ()

#: Rows that differ in what the edge rules of an engine branch on: order of the rule, first-order
#: direction or not, number of states, latched radius, norm of the weights measured or not; and
#: Lion, whose step of a zero gradient is no product with it.
EDGES = (
    *("nag-layca", "nag-singh", "nag-lars", "mom-lars", "mom-layca-frozen", "mom-none"),
    *("adamw-lamb", "adamw-none", "ams-layca", "adagrad-singh", "rms-cm-rated", "rms-c-rated"),
    *("lion-none", "adam-mini"),
)
#: Rows in the dtypes other than float32. The dtype is a template argument: what loads and stores
#: does not know the direction, and what computes sees float32 (or float64) alone.
DTYPE_ROWS = ("nag-layca", "nag-singh", "mom-lars", "adamw-lamb", "adamw-none", "rms-cm-rated")

#: backend -> the rows that it is asked by a test without the mark; the others get every row.
#: Triton has formulas, sums and edge rules of its own, so it is asked about these. Plans, checks,
#: state and layers it shares with the C++ engines, and its interpreter takes 5 to 25 times as long.
ROWS = {"triton": EDGES}
#: backend -> the rows that `make test` asks of it: both orders, a radius, rates from outside, one
#: to three states. A test without rows says by the mark ``quick(triton=NONE)`` that it is left
#: out. Triton interpreted takes two fifths of the time of all tests.
QUICK = {"triton": ("nag-layca", "nag-singh", "adamw-lamb", "rms-cm-rated")}


def parameters(item) -> tuple[str | None, str | None, torch.dtype]:
    """Backend, row and dtype of an item, as far as it has them."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    engine = params.get("engine") or params.get("other")
    case = getattr(params.get("case"), "id", None)
    return getattr(engine, "backend", None), case, params.get("dtype", torch.float32)


def selects(item, mark: str, default) -> bool:
    """Whether an item is among the rows that a mark, or else a table of backends, names."""
    backend, case, _ = parameters(item)
    found = item.get_closest_marker(mark)
    said = found.kwargs if found else {}
    rows = said.get(backend, said.get("others", default.get(backend, EVERY)))
    return rows is EVERY or (case in rows if case else rows != NONE)


def asked(item) -> bool:
    """Whether an item is part of the selection."""
    _, case, dtype = parameters(item)
    if case and dtype != torch.float32 and case not in DTYPE_ROWS:
        return False
    return selects(item, "asked", ROWS)


def marked(item):
    """The item, which `make test` leaves out where its row is another."""
    if not selects(item, "quick", QUICK):
        item.add_marker(pytest.mark.full(f"other rows of {parameters(item)[0]}"))
    return item


def pytest_configure(config):
    config.addinivalue_line("markers", "asked(**rows): the rows that a backend is asked")
    config.addinivalue_line("markers", "quick(**rows): those that it is asked by `make test`")


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem():
    made = yield
    return [marked(item) for item in made if asked(item)] if isinstance(made, list) else made
