"""Pieces of work side by side as long as the time lasts, each with a kind by which its seconds are foreseen."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.time_limit import TimeLimit


class Here(Executor):
    """In this process, one after the other."""

    def __init__(self, initializer: Callable[..., None], initargs: tuple = ()) -> None:
        initializer(*initargs)

    def submit(self, work: Callable, /, *arguments: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def within_time(work: Callable[[Any], Any], items: Sequence[Any], kind: Callable[[Any], str], limit: TimeLimit, *,
                workers: int, initializer: Callable[..., None], initargs: tuple = ()
                ) -> Iterator[tuple[Any, Any, Exception | None]]:
    """(item, work(item), None), or (item, None, error), as they are done; an item that would not end in time is passed
    over, and those under way end. How long one took is for the caller to tell the limit. initializer: prepares each
    worker process; one worker is this process."""
    pool = Here(initializer, initargs) if workers == 1 else \
        ProcessPoolExecutor(workers, get_context("spawn"), initializer, initargs)
    waiting, running = list(items), {}
    with pool:
        while True:
            while len(running) < workers and (item := _next(waiting, kind, limit)) is not None:
                try:
                    running[pool.submit(work, item)] = item
                except BrokenProcessPool as death:  # a worker was killed, perhaps for memory: nothing more can start
                    waiting.clear()
                    yield item, None, death
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                item, error = running.pop(future), future.exception()
                yield item, None if error else future.result(), error


def threads_each(device: torch.device, workers: int) -> int:
    """Threads of a worker: one on a CPU, where sums must not depend on the machine, else its share of the cores."""
    return 1 if device.type == "cpu" else max(1, (os.cpu_count() or 1) // workers)


def _next(waiting: list[Any], kind: Callable[[Any], str], limit: TimeLimit) -> Any | None:
    """Take the first item that ends in time."""
    for i, item in enumerate(waiting):
        if limit.fits(kind(item)):
            return waiting.pop(i)
    return None
