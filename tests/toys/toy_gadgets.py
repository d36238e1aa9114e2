"""A callback with arguments that take anything, as a hostile config would look for."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.callbacks import Callback


class Holder(Callback):
    """Calls what it is given when training starts.

    Args:
        anything: Kept.
        call: Called without arguments.
    """

    def __init__(self, anything: Any = None, call: Callable | None = None):
        super().__init__()
        self.anything, self.call = anything, call

    def on_train_start(self, *_: object) -> None:
        if self.call is not None:
            self.call()
