"""``make test`` leaves out tests with the mark ``full``, and its last line says what they are.

``make test-all`` and CI run them. A pytest plugin, active under ``-m "not full"``.
"""

from __future__ import annotations

from collections import Counter

import pytest

_left_out: Counter[str] = Counter()


def active(config) -> bool:
    return config.getoption("markexpr") == "not full"


def pytest_configure(config):
    config.addinivalue_line("markers", "full(subject): left out by `make test`")
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(_OfWorkers())


def pytest_deselected(items):
    for item in items:
        if mark := item.get_closest_marker("full"):
            _left_out[mark.args[0]] += 1


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(_left_out)


class _OfWorkers:
    """With pytest-xdist the tests are collected by workers, each of which sees all of them."""

    def pytest_testnodedown(self, node):
        _left_out.update(Counter(getattr(node, "workeroutput", {}).get("left_out", {})) - _left_out)


def pytest_unconfigure(config):
    """After pytest's closing line."""
    if active(config) and _left_out and not hasattr(config, "workeroutput"):
        subjects = ", ".join(f"{name} {n}" for name, n in sorted(_left_out.items()))
        print(f"make test-all runs {sum(_left_out.values())} tests more: {subjects}")
