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


def asked(item) -> bool:
    """Whether an item is part of the selection."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    case = getattr(params.get("case"), "id", None)
    if case and params.get("dtype", torch.float32) != torch.float32 and case not in DTYPE_ROWS:
        return False
    engine = params.get("engine") or params.get("other")
    backend = engine.backend if engine else None
    mark = item.get_closest_marker("asked")
    said = mark.kwargs if mark else {}
    rows = said.get(backend, said.get("others", ROWS.get(backend, EVERY)))
    return rows is EVERY or (case in rows if case else rows != NONE)


def pytest_configure(config):
    config.addinivalue_line("markers", "asked(**rows): the rows that a backend is asked")


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem():
    made = yield
    return list(filter(asked, made)) if isinstance(made, list) else made
