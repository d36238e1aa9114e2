"""The end of a process whose interpreter is never free again. Pure standard library."""

import faulthandler
import os
import threading


class LastResort:
    """Writes all stacks and ends the process with code 1, unless that is put off in time.

    Python's own threads need the interpreter's lock to do anything at all; a C function that never
    gives it back stops them all. This timer is faulthandler's, in C, and needs no lock. There is
    one in a process.

    Around a fork it is stopped: a child would inherit the belief that a timer runs, and wait for
    its thread for ever when the interpreter ends.

    Args:
        descriptor: The open file that gets the stacks.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._seconds: float | None = None
        self._lock = threading.Lock()
        os.register_at_fork(
            before=self._pause,
            after_in_parent=self._go_on,
            after_in_child=self._forget,
        )

    def put_off(self, seconds: float) -> None:
        """Let the process live for so many seconds from now."""
        with self._lock:
            self._seconds = seconds
            self._start()

    def stop(self) -> None:
        """Let the process live."""
        with self._lock:
            if self._seconds is not None:
                faulthandler.cancel_dump_traceback_later()
            self._seconds = None

    def _start(self) -> None:
        if self._seconds is not None:
            faulthandler.dump_traceback_later(self._seconds, file=self._descriptor, exit=True)

    def _pause(self) -> None:
        self._lock.acquire()
        if self._seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    def _go_on(self) -> None:
        self._start()
        self._lock.release()

    def _forget(self) -> None:
        self._seconds = None
        self._lock = threading.Lock()
