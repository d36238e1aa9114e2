"""A thread that ends a process of a run in which nothing moves, and the others with it.

::

    hang.json           that a rank has waited long enough, which one, and in which attempt
    hang-rank-3.txt     the stacks of all threads of a rank; empty while it is watched

Pure standard library.
"""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from segalign.atomic import make_directory, storage_errors, write_text_atomic
from segalign.json_text import parse_json
from segalign.last_resort import LastResort
from segalign.stillness import Place, Stillness, place_of

HANG_EXIT_CODE = 71  # EX_OSERR

_MARK = "hang.json"
_STDERR = 2
_LONGEST_GRACE = 60.0  # seconds; a network's file system may show a new file that late
_LONGEST_PAUSE = 5.0  # seconds between two looks
_ORPHAN_SECONDS = 10.0  # that a rank may outlive the one that has started it
_WORKER_PAUSE = 0.2  # seconds for a child to write its stacks
# Asks children for their stacks; nobody else uses it. Where there are no such signals, none is.
_ASK = signal.SIGRTMIN + 5 if hasattr(signal, "SIGRTMIN") else None


class HangWatcher:
    """Watches the main thread of one rank.

    Args:
        folder: Where the stacks go, the same for all ranks.
        attempt: Tells the processes that run together from all others that write there; the same
            for all ranks.
        rank: Of this process.
        world_size: Of the run.
        seconds: How long nothing may move.
        launcher: The parent process, if this one has to end with it; None if it has not.
    """

    def __init__(
        self,
        folder: Path,
        *,
        attempt: str,
        rank: int,
        world_size: int,
        seconds: float,
        launcher: int | None = None,
    ) -> None:
        self.folder = folder
        self.attempt = attempt
        self.rank = rank
        self.world_size = world_size
        self.seconds = seconds
        self.grace = min(seconds, _LONGEST_GRACE)
        self._launcher = launcher
        self._orphaned_at: float | None = None
        self._pause = min(seconds / 20, _LONGEST_PAUSE)
        self._event = (0, "its start", 0, _now())  # number, name, step, time
        self._stopped = threading.Event()
        self._main = threading.main_thread().ident or 0

    def start(self) -> None:
        """Watch from now on.

        Raises:
            StorageError: If the file for the stacks cannot be written.
        """
        make_directory(self.folder)
        self._clean()
        path = self._path(self.rank)
        with storage_errors(path):
            self._file = path.open("xb", buffering=0)
        self._last_resort = LastResort(self._file.fileno())
        if _ASK is not None:
            # Forked children, such as those that load data, inherit it with the file.
            faulthandler.register(_ASK, file=self._file.fileno(), all_threads=True)
        self._stillness = Stillness(time.monotonic(), longest_gap=self.seconds / 4)
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
        self._put_off()
        self._thread.start()

    def note(self, name: str, step: int) -> None:
        """Note that something has happened in this process, at an optimizer step."""
        self._event = (self._event[0] + 1, name, step, _now())

    def stop(self) -> None:
        """Watch no longer; when the process is being ended already, wait for that."""
        self._stopped.set()
        self._thread.join()
        self._last_resort.stop()
        if _ASK is not None:
            faulthandler.unregister(_ASK)
        path, own = self._path(self.rank), os.fstat(self._file.fileno())
        self._file.close()
        with contextlib.suppress(OSError):
            found = path.stat()
            # Another attempt may have put its own in its place.
            if found.st_size == 0 and os.path.samestat(found, own):
                path.unlink()

    # Files

    def _path(self, rank: int) -> Path:
        return self.folder / f"hang-rank-{rank}.txt"

    def _clean(self) -> None:
        """Remove what an earlier attempt has left: each rank its own, the first all others'."""
        with storage_errors(self.folder):
            self._path(self.rank).unlink(missing_ok=True)
            if self.rank == 0:
                own = {self._path(rank) for rank in range(self.world_size)}
                for path in {*self.folder.glob("hang-rank-*.txt")} - own:
                    path.unlink(missing_ok=True)
                if self._told() is None:
                    (self.folder / _MARK).unlink(missing_ok=True)

    def _told(self) -> tuple[int, str] | None:
        """Read which rank of this attempt waits, and since when, if one does."""
        try:
            told = parse_json((self.folder / _MARK).read_bytes())
            return (told["rank"], told["since"]) if told["attempt"] == self.attempt else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _num_answers(self) -> int:
        count = 0
        for rank in range(self.world_size):
            with contextlib.suppress(OSError):
                count += self._path(rank).stat().st_size > 0
        return count

    # Watching

    def _put_off(self) -> None:
        self._last_resort.put_off(self.seconds + self.grace / 2)

    def _watch(self) -> None:
        while not self._stopped.wait(self._pause):
            self._put_off()
            place = place_of(self._main)
            still = self._stillness.look(time.monotonic(), self._event[0], place)
            self._follow_launcher()
            if still >= self.seconds:
                self._end(f"nothing has moved here for {still:.0f} s", place, is_first=True)
            if self._told() is not None:
                self._end("another rank waits for too long", place, is_first=False)

    # Ending

    def _follow_launcher(self) -> None:
        """End some time after the launcher; a run that has come to its end needs no more."""
        if self._launcher is None or os.getppid() == self._launcher:
            return
        now = time.monotonic()
        self._orphaned_at = self._orphaned_at or now
        if now - self._orphaned_at >= _ORPHAN_SECONDS:
            self._leave(
                f"error: expected process {self._launcher}, which has started rank {self.rank}, to "
                "live; it has ended. See what ended it; go on with `--ckpt_path auto`"
            )

    def _end(self, reason: str, place: Place, *, is_first: bool) -> None:
        """Write the stacks, give the other ranks the time to do so, and end the process."""
        self._last_resort.put_off(2 * self.grace)  # should a file or the terminal block
        since = _time(_now() - timedelta(seconds=time.monotonic() - self._stillness.moved_at))
        if is_first:
            self._tell_others(since)
        text = f"{reason}\n{self._describe(since, place)}\n\n".encode()
        for descriptor in (self._file.fileno(), _STDERR):
            with contextlib.suppress(OSError):
                os.write(descriptor, text)
                faulthandler.dump_traceback(descriptor, all_threads=True)
        self._ask_children()
        num_answers = self._wait_for_answers()
        own = (self.rank, since)
        waiting, since = own if is_first else self._told() or ("another", "some time ago")
        self._leave(
            f"error: expected the run to move within {self.seconds:g} s; on rank {waiting} "
            f"nothing has moved since {since}; the stacks of {num_answers} of {self.world_size} "
            f"ranks are in `{self._path(self.rank).with_stem('hang-rank-*')}`. See there what "
            "waits for what; go on with `--ckpt_path auto`; a longer `hang_watch.seconds` bears "
            "with slower work"
        )

    def _tell_others(self, since: str) -> None:
        told = {
            "attempt": self.attempt,
            "rank": self.rank,
            "seconds": self.seconds,
            "since": since,
        }
        # A full disk keeps nobody from ending; the others have watches of their own.
        with contextlib.suppress(OSError):
            write_text_atomic(self.folder / _MARK, json.dumps(told) + "\n")

    def _describe(self, since: str, place: Place) -> str:
        _, name, step, at = self._event
        inner = "nowhere"
        if place:
            code, line = place[0]
            inner = f"`{code.co_qualname}`, {code.co_filename}:{line}"
        return (
            f"rank {self.rank} of {self.world_size}, process {os.getpid()} on "
            f"{socket.gethostname()}, {_time(_now())}\n"
            f"last event: {name} at step {step}, {_time(at)}\n"
            f"main thread: in {inner}; last seen moving at {since}"
        )

    def _ask_children(self) -> None:
        for child in multiprocessing.active_children():
            with contextlib.suppress(OSError):
                os.write(self._file.fileno(), f"\nchild {child.name}, {child.pid}\n".encode())
                if _ASK is not None and child.pid is not None:
                    os.kill(child.pid, _ASK)
                    time.sleep(_WORKER_PAUSE)

    def _wait_for_answers(self) -> int:
        deadline = time.monotonic() + self.grace
        while self._num_answers() < self.world_size and time.monotonic() < deadline:
            time.sleep(self._pause / 5)
        return self._num_answers()

    def _leave(self, line: str) -> None:
        # Processes that load data may be what hangs, and would go on without their parent.
        for child in multiprocessing.active_children():
            child.kill()
        with contextlib.suppress(OSError):
            os.write(_STDERR, f"{line}\n".encode())
        os._exit(HANG_EXIT_CODE)


def _now() -> datetime:
    return datetime.now(UTC)


def _time(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
