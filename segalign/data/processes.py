"""Spread tasks over processes that end with their parent, however that ends."""

import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from segalign.errors import SegalignError

Result = TypeVar("Result")
Work = Callable[[int, Callable[[int], None]], Result]
"""Does one task and tells how many items it has done since it last told."""


def run_tasks(
    work: Work[Result],
    tasks: Sequence[int],
    *,
    num_processes: int,
    advance: Callable[[int], None],
) -> Iterator[Result]:
    """Yield the results of the tasks as they come, in no particular order.

    Args:
        work: Called with a task and a function to report progress to; must be picklable if there
            is more than one process.
        tasks: Numbers of the tasks.
        num_processes: 1 works in this process.
        advance: Called with the number of items done.

    Raises:
        SegalignError: The first that a task raised.
        RuntimeError: If a process died.
    """
    if min(num_processes, len(tasks)) <= 1:
        for task in tasks:
            yield work(task, advance)
        return
    pool = _Pool(work, min(num_processes, len(tasks)))
    try:
        yield from pool.run(list(tasks), advance)
    finally:
        pool.close()


class _Pool(Generic[Result]):
    """Processes that each take one task at a time over a pipe.

    A process whose parent was killed reads the end of its pipe and stops.
    """

    def __init__(self, work: Work[Result], size: int) -> None:
        self._processes: dict[Connection, BaseProcess] = {}
        if _can_fork():
            self._start(multiprocessing.get_context("fork"), work, size, is_fork=True)
        else:
            self._start(multiprocessing.get_context("spawn"), work, size, is_fork=False)

    def _start(
        self, context: ForkContext | SpawnContext, work: Work[Result], size: int, *, is_fork: bool
    ) -> None:
        for _ in range(size):
            ours, theirs = context.Pipe()
            inherited = [*self._processes, ours] if is_fork else []
            process = context.Process(target=_serve, args=(theirs, work, inherited), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process

    def run(self, tasks: list[int], advance: Callable[[int], None]) -> Iterator[Result]:
        pending = tasks[::-1]
        busy = {connection for connection in self._processes if _give(connection, pending)}
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                kind, value = self._receive(ready)
                if kind == "progress":
                    advance(value)
                elif kind == "failed":
                    raise value
                else:
                    if not _give(ready, pending):
                        busy.remove(ready)
                    yield value

    def close(self) -> None:
        """Stop all processes; one at work is ended."""
        for connection, process in self._processes.items():
            connection.close()
            process.terminate()
            process.join()

    def _receive(self, connection: Connection) -> tuple[str, Any]:
        try:
            message: tuple[str, Any] = connection.recv()
        except EOFError as err:
            process = self._processes[connection]
            process.join()
            raise RuntimeError(f"a process ended with code {process.exitcode}") from err
        return message


def _give(connection: Connection, pending: list[int]) -> bool:
    if not pending:
        return False
    connection.send(pending.pop())
    return True


def _can_fork() -> bool:
    """Tell whether a copy of this process is safe; it spares the new one its imports."""
    return sys.platform == "linux" and "torch" not in sys.modules and threading.active_count() == 1


def _serve(connection: Connection, work: Work[object], inherited: Sequence[Connection]) -> None:
    """Do tasks until the parent closes the pipe or is gone.

    ``inherited`` are copies of the parent's ends; one left open would hide the parent's death.
    """
    for copy in inherited:
        copy.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while True:
            task = connection.recv()
            try:
                result = work(task, lambda count: connection.send(("progress", count)))
            except SegalignError as err:
                connection.send(("failed", err))
            else:
                connection.send(("done", result))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
