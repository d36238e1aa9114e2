"""Stop at a step boundary when a cluster says that it takes the machine away, and requeue."""

from typing import Literal

from jsonargparse.typing import NonNegativeInt
from lightning.pytorch.callbacks import Callback


class Preemption(Callback):
    """Answer a signal with a checkpoint, a requeue, and exit code 85.

    Args:
        signal: What the cluster sends before it takes the machine away; null answers none.
        requeue: Put the SLURM job back into its queue, once all is saved.
        max_requeues: How often a job may be put back.
    """

    def __init__(
        self,
        signal: Literal["USR1", "USR2", "TERM"] | None = None,
        requeue: bool = True,
        max_requeues: NonNegativeInt = 20,
    ) -> None:
        super().__init__()
        self.signal = signal
        self.requeue = requeue
        self.max_requeues = max_requeues
