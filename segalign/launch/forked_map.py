"""Do the same with many things on all cores that this process may use."""

import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Final, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_MAX_WORKERS: Final = 8
_MIN_ITEMS: Final = 16


def forked_map(
    function: Callable[[Item], Result], items: Sequence[Item], num_workers: int | None = None
) -> list[Result]:
    """Apply a function to each item, in copies of this process that know all that it knows.

    The first item is done here, so that the copies begin with what it has loaded.

    Args:
        function: Takes an item; what it returns must be picklable.
        items: The items.
        num_workers: Processes; None is as many as there are cores to use, for enough items. One
            does all of it here, and so does a process with threads, which cannot be copied.

    Returns:
        What it returns, in the order of items.
    """
    results = [function(item) for item in items[:1]]
    rest = items[1:]
    if num_workers is None:
        num_workers = min(_MAX_WORKERS, _num_cores(), len(rest) // _MIN_ITEMS)
    if num_workers < 2 or threading.active_count() > 1:
        return results + [function(item) for item in rest]
    bounds = [len(rest) * worker // num_workers for worker in range(num_workers + 1)]
    shares = [rest[start:end] for start, end in itertools.pairwise(bounds)]
    return results + _run_workers(function, shares)


def _run_workers(function: Callable[[Any], Any], shares: Sequence[Sequence[Any]]) -> list[Any]:
    context = multiprocessing.get_context("fork")
    workers = []
    try:
        for share in shares:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(function, share, sender), daemon=True)
            process.start()
            sender.close()
            workers.append((process, receiver))
        return [result for _, receiver in workers for result in _received(receiver)]
    finally:
        for process, receiver in workers:
            receiver.close()
            process.terminate()
            process.join()


def _work(function: Callable[[Any], Any], share: Sequence[Any], sender: Connection) -> None:
    try:
        sender.send((True, [function(item) for item in share]))
    except Exception as error:  # noqa: BLE001  # the process that waits raises it
        sender.send((False, error))


def _received(receiver: Connection) -> list[Any]:
    try:
        is_result, content = receiver.recv()
    except EOFError as error:
        raise RuntimeError("a worker process ended before its work was done") from error
    if not is_result:
        raise content
    results: list[Any] = content
    return results


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
