"""A signal that only sets a flag, for a loop that looks at it where it can stop."""

import os
import signal
import threading
from types import FrameType
from typing import Any


class SignalFlag:
    """Note that a signal has come, and do nothing else.

    Processes forked while it listens, such as those that load data, live on when the signal
    reaches them too, or the SIGTERM that ends a job after another signal: were they to end first,
    their parent would fail. Handlers belong to the main thread; elsewhere nothing is noted.

    Args:
        number: The signal.

    Attributes:
        is_set: Whether it has come since ``listen``.
    """

    def __init__(self, number: signal.Signals) -> None:
        self.number = number
        self.is_set = False
        self._previous: Any = None
        self._is_listening = False

    def listen(self) -> None:
        """Put the handler in place, also where somebody else has put another one since."""
        if threading.current_thread() is not threading.main_thread():
            return
        previous = signal.signal(self.number, self._note)
        if not self._is_listening:
            self._previous = previous
            self._is_listening = True
            os.register_at_fork(after_in_child=self._heed_parent_alone)

    def stop(self) -> None:
        """Put back the handler that was there before; a signal that still comes here goes on."""
        if not self._is_listening:
            return
        self._is_listening = False
        if signal.getsignal(self.number) == signal.SIG_IGN:
            return  # somebody needs the process to end by itself
        # In C, some library may have put its own in place, which Python sees as None.
        signal.signal(self.number, signal.SIG_DFL if self._previous is None else self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._is_listening:
            self.is_set = True
            return
        # Somebody has put this handler back after ``stop``.
        signal.signal(number, signal.SIG_DFL if self._previous is None else self._previous)
        signal.raise_signal(number)

    def _heed_parent_alone(self) -> None:
        """Let a forked child end by SIGTERM of its parent, which so ends it, and of nobody else."""
        if not self._is_listening:
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, name="sigterm", daemon=True).start()


def ignore(number: signal.Signals) -> None:
    """Let a signal change nothing until the process ends."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, signal.SIG_IGN)


def _wait_for_parent() -> None:
    parent = os.getppid()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(0)
