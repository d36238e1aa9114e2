"""Callbacks that make a run fail, die, or wait for a signal, at a given step, once."""

import json
import os
import signal
import time
from pathlib import Path

from lightning.pytorch.callbacks import Callback

LONGEST_WAIT = 120.0  # seconds


class Once(Callback):
    """Do something at an optimizer step, in the first process of each rank that reaches it.

    Args:
        at_step: The step.
        marker: File that it makes, with the rank appended; it holds the run directory.
        seed: Only in runs whose data has this seed; None in all.
    """

    def __init__(self, at_step: int, marker: str, seed: int | None = None):
        super().__init__()
        self.at_step, self.marker, self.seed = at_step, marker, seed

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        is_mine = self.seed is None or trainer.datamodule.seed == self.seed
        if trainer.global_step == self.at_step and is_mine:
            self.reach(trainer)

    def is_first(self, trainer) -> bool:
        try:
            with Path(f"{self.marker}-{trainer.global_rank}").open("x") as file:
                file.write(str(trainer.default_root_dir))
        except FileExistsError:
            return False
        return True

    def reach(self, trainer) -> None:
        raise NotImplementedError


class FailOnce(Once):
    """Raise an exception."""

    def reach(self, trainer) -> None:
        if self.is_first(trainer):
            raise RuntimeError(f"told to fail at step {self.at_step}")


class KillOnce(Once):
    """End this very process by SIGKILL."""

    def reach(self, trainer) -> None:
        if self.is_first(trainer):
            os.kill(os.getpid(), signal.SIGKILL)


class HoldOnce(Once):
    """Wait until SIGUSR1 has come."""

    def reach(self, trainer) -> None:
        came = []
        answer = signal.getsignal(signal.SIGUSR1)
        assert callable(answer), answer

        def remember(number, frame):
            came.append(number)
            answer(number, frame)

        # The signal may come as soon as the marker is there.
        signal.signal(signal.SIGUSR1, remember)
        if self.is_first(trainer):
            deadline = time.monotonic() + LONGEST_WAIT
            while not came:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        signal.signal(signal.SIGUSR1, answer)


class RankLossRecorder(Callback):
    """Append every batch's loss, exactly, to a file of each rank."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        record = {"batch": int(batch[0]), "loss": outputs["loss"].item().hex()}
        path = Path(trainer.default_root_dir) / f"losses-{trainer.global_rank}.jsonl"
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
