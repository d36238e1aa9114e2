"""Show progress on stderr: a bar in a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def show_progress(title: str, total: int, *, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Give a function that is told how many more items are done.

    Args:
        title: What is counted.
        total: Items in all.
        done: Items done before the start.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        with _plain_lines(console, title, total, done) as advance:
            yield advance
        return
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, completed=done)
        yield lambda count: progress.advance(task, count)


@contextmanager
def _plain_lines(
    console: Console, title: str, total: int, done: int
) -> Iterator[Callable[[int], None]]:
    last_line = time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, last_line
        done += count
        if time.monotonic() - last_line >= _SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            console.print(f"{title}: {done} of {total}", highlight=False)

    yield advance
    console.print(f"{title}: {done} of {total}", highlight=False)
