"""Processes that train what a queue hands out, one job each at a time.

Results come back to the one process that writes. A job that takes too long costs its process,
one that fails costs itself; both are told, and the others go on.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

START = 120.0  # seconds to import and to read the data, beside a job's own


class Queue(Protocol):
    """Where jobs come from, and what becomes of them."""

    def next(self) -> Any:
        """A job, or None where there is none at the moment."""

    def done(self, job: Any, results: Any) -> None: ...

    def failed(self, job: Any, why: str) -> None: ...


class Worker:
    """A process that holds `prepare()`, a function from a job to its results."""

    def __init__(self, prepare: Callable[[], Callable[[Any], Any]]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork could not use a GPU
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(prepare, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Any = None
        self.deadline, self.fresh = 0.0, True

    def give(self, job: Any, limit: float) -> None:
        self.job = job
        self.deadline = time.monotonic() + limit + START * self.fresh
        self.fresh = False
        self.connection.send(job)

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def run(
    queue: Queue, prepare: Callable[[], Callable[[Any], Any]], count: int, limit: float
) -> None:
    """Until the queue has no job and no process works at one; a job has `limit` seconds."""
    idle = [Worker(prepare) for _ in range(count)]
    busy: list[Worker] = []
    try:
        while True:
            while idle and (job := queue.next()) is not None:
                busy.append(idle.pop())
                busy[-1].give(job, limit)
            if not busy:
                return
            left = min(worker.deadline for worker in busy) - time.monotonic()
            ready = wait([worker.connection for worker in busy], max(left, 0.0))
            for worker in list(busy):
                if worker.connection in ready:
                    whole = _receive(worker, queue)
                elif time.monotonic() >= worker.deadline:
                    queue.failed(worker.job, f"ended: it took more than {limit:g} s")
                    whole = False
                else:
                    continue
                busy.remove(worker)
                if not whole:
                    worker.end()
                idle.append(worker if whole else Worker(prepare))
    finally:
        for worker in idle + busy:
            worker.end()


def _receive(worker: Worker, queue: Queue) -> bool:
    """Hand over what a worker says; whether it can go on."""
    try:
        kind, found = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join(1.0)
        queue.failed(worker.job, f"its process ended with {worker.process.exitcode}")
        return False
    if kind == "done":
        queue.done(worker.job, found)
    else:
        queue.failed(worker.job, found)
    return kind == "done"  # an error on a GPU may have spoiled the process


def _serve(prepare: Callable[[], Callable[[Any], Any]], connection: Connection) -> None:
    try:
        work = prepare()
        while True:
            connection.send(("done", work(connection.recv())))
    except (EOFError, KeyboardInterrupt):
        pass  # nobody is listening
    except BaseException:
        connection.send(("failed", traceback.format_exc()))
