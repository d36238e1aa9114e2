"""The processes that work together; one that is alone is the only one."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

from torch import distributed

from segalign.errors import SegalignError, StoppedError

_KNOWN_TO_ALL: Final = "_is_known_to_all_ranks"
_logger = logging.getLogger(__name__)
T = TypeVar("T")


def is_distributed() -> bool:
    """Tell whether there is a process group."""
    return distributed.is_available() and distributed.is_initialized()


def own_rank() -> int:
    """Return this process's number."""
    return distributed.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if is_distributed() else 1


@contextlib.contextmanager
def leaving_group() -> Iterator[None]:
    """Leave the process group that is joined within a block, where all ranks end it alike.

    That is when it succeeds, or is stopped before its time. Gloo's threads may still hold on to a
    tensor; one that lets go while the interpreter is being torn down aborts the process, whose exit
    code then says nothing of what it has done. After other errors a rank may have left others in
    the middle of a collective, and to wait for the end of that would keep it from ending.
    """
    was_distributed = is_distributed()

    def leave() -> None:
        if is_distributed() and not was_distributed:
            distributed.destroy_process_group()

    try:
        yield
    except StoppedError:
        leave()
        raise
    leave()


def gather_objects(own: Any) -> list[Any]:
    """Gather plain data of all ranks, in rank order; every rank must call it."""
    if not is_distributed():
        return [own]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, own)
    return gathered


def together(work: Callable[[], T], *, is_long: bool = False) -> T:
    """Do something on every rank; where it fails on one, it fails on all, so that none waits.

    Work may use ``together`` in turn: a rank that fails before it meets the others there. It cannot
    meet them inside any other collective, such as those of a sharded model: they wait for it.

    Args:
        work: What is done.
        is_long: A rank that fails says so at once, not only when the others have finished.

    Returns:
        What this rank's work returns.

    Raises:
        SegalignError: That of the first rank where it failed. A rank with an error of another
            kind raises that, and the others say which rank it was.
    """
    result: list[T] = []
    failure: Exception | None = None
    try:
        result.append(work())
    except Exception as error:
        if getattr(error, _KNOWN_TO_ALL, False):
            raise
        failure = error
        if is_long and world_size() > 1:
            _logger.warning("process %d has failed and waits: %s", own_rank(), _one_line(error))
    reports = gather_objects(None if failure is None else _report(failure))
    failed = [rank for rank, report in enumerate(reports) if report is not None]
    if not failed:
        return result[0]
    is_own = failed[0] == own_rank() or not isinstance(failure, SegalignError)
    raised: Exception = failure if failure is not None and is_own else reports[failed[0]]
    setattr(raised, _KNOWN_TO_ALL, True)
    raise raised


def _report(error: Exception) -> SegalignError:
    """Return what the other ranks raise; an error of a library may not survive the journey."""
    if isinstance(error, SegalignError):
        return error
    return SegalignError(
        f"expected every process to do its part; process {own_rank()} has failed with "
        f"{_one_line(error)}; look at what that process has written"
    )


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].strip()}".removesuffix(": ")
