"""Show progress on stderr: a bar in a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_REFRESHES = 0.1


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
    # Without a thread that refreshes the bar, so that a process may still fork.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task(title, total=total, completed=done)
        progress.refresh()
        last_refresh = time.monotonic()

        def advance(count: int) -> None:
            nonlocal last_refresh
            progress.advance(task, count)
            if time.monotonic() - last_refresh >= _SECONDS_BETWEEN_REFRESHES:
                last_refresh = time.monotonic()
                progress.refresh()

        yield advance


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
