"""Being asked to stop: remembered by a signal handler, answered where the work can be put down."""

import signal
from types import FrameType, TracebackType
from typing import Final, Self

from segalign.errors import ConfigError

_STOPPING: Final = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Catches SIGTERM and SIGINT inside a ``with`` block.

    Args:
        forwarded: Another signal to catch, which asks for nothing but to be handed on.

    Attributes:
        signal: What asked this process to stop; None as long as nothing has.
        num_asked: How often it was asked.
        is_announced: Whether the other signal has ever come.
    """

    def __init__(self, forwarded: signal.Signals | None = None) -> None:
        self.signal: signal.Signals | None = None
        self.num_asked = 0
        self.is_announced = False
        # What stops this process is not handed on too, if both are one signal.
        named = () if forwarded is None else (forwarded,)
        self._forwarded = {*named} - {*_STOPPING}
        self._caught = {*_STOPPING, *self._forwarded}
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

    @property
    def is_told(self) -> bool:
        """Whether any of the signals has come."""
        return self.is_announced or self.signal is not None

    def take_forwarded(self) -> list[signal.Signals]:
        """Return the signals to hand on that have come since the last call."""
        taken, self._to_forward = self._to_forward, []
        return taken

    def _remember(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number)
        if name in self._forwarded:
            self.is_announced = True
            self._to_forward.append(name)
        else:
            self.signal = self.signal or name
            self.num_asked += 1


def signal_named(name: str) -> signal.Signals:
    """Find the signal of a name such as ``USR1``.

    Raises:
        ConfigError: If there is none.
    """
    try:
        return signal.Signals[f"SIG{name.removeprefix('SIG')}"]
    except KeyError as error:
        raise ConfigError(
            f"expected the name of a signal, such as `USR1`; got `{name}`. "
            "Mend `slurm.signal` of the study."
        ) from error
