"""Being asked to stop: remembered by a signal handler, answered where the work can be put down."""

import signal
from types import FrameType, TracebackType
from typing import Final, Self

_STOPPING: Final = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Catches SIGTERM and SIGINT inside a ``with`` block.

    Args:
        forwarded: Another signal to catch, which asks for nothing but to be handed on.

    Attributes:
        signal: What asked this process to stop; None as long as nothing has.
        num_asked: How often it was asked.
    """

    def __init__(self, forwarded: signal.Signals | None = None) -> None:
        self.signal: signal.Signals | None = None
        self.num_asked = 0
        self._caught = {*_STOPPING, *(() if forwarded is None else (forwarded,))}
        self._to_forward: list[signal.Signals] = []
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        """Install the handlers; only the main thread can."""
        self._before = {name: signal.signal(name, self._remember) for name in self._caught}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Bring the former handlers back."""
        for name, handler in self._before.items():
            signal.signal(name, handler)  # type: ignore[arg-type]

    def ask(self, name: signal.Signals = signal.SIGTERM) -> None:
        """Ask as a signal does."""
        self.signal = self.signal or name
        self.num_asked += 1

    def take_forwarded(self) -> list[signal.Signals]:
        """Return the signals to hand on that have come since the last call."""
        taken, self._to_forward = self._to_forward, []
        return taken

    def _remember(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number)
        if name in _STOPPING:
            self.ask(name)
        else:
            self._to_forward.append(name)
