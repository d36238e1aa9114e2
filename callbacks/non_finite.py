"""Skip steps whose losses or gradients are not finite, and end a run that has too many."""

from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from lightning.pytorch.callbacks import Callback


class NonFiniteSteps(Callback):
    """Count the optimizer steps that were skipped, and end the run when there are too many.

    Args:
        max_in_a_row: So many skipped steps in a row end the run.
        max_share: Largest share of skipped steps among the last ``window`` ones, in [0, 1].
        window: Steps that ``max_share`` looks back on.
    """

    def __init__(
        self,
        max_in_a_row: PositiveInt = 10,
        max_share: ClosedUnitInterval = 0.01,
        window: PositiveInt = 1000,
    ) -> None:
        super().__init__()
        self.max_in_a_row = max_in_a_row
        self.max_share = max_share
        self.window = window
