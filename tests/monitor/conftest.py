"""A device whose copies take their time."""

import math

import pytest
import torch

from layerlr.monitor import copies


class Device:
    """Stands for a device whose copies arrive when the test says so."""

    def __init__(self, monkeypatch):
        self.events = []
        monkeypatch.setattr(copies, "to_host", self.to_host)

    def to_host(self, values):
        host = torch.full_like(values, math.nan)
        event = Event(lambda: host.copy_(values))
        self.events.append(event)
        return host, event


class Event:
    def __init__(self, arrive):
        self._arrive, self.done, self.waits, self.queries = arrive, False, 0, 0

    def finish(self):
        self._arrive()
        self.done = True

    def query(self):
        self.queries += 1
        return self.done

    def synchronize(self):
        self.waits += 1
        self.finish()


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)
