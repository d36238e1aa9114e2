"""End a run in which nothing moves any more, and say where every rank stands."""

from jsonargparse.typing import PositiveFloat
from lightning.pytorch.callbacks import Callback


class HangWatch(Callback):
    """Write the stacks of all threads of all ranks, and end the run, when nothing has moved.

    Args:
        seconds: How long nothing may move; null watches nothing.
    """

    def __init__(self, seconds: PositiveFloat | None = 1800) -> None:
        super().__init__()
        self.seconds = seconds
