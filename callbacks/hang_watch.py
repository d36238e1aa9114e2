"""End a run in which nothing moves any more, and say where every rank stands."""

import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
from jsonargparse.typing import PositiveFloat
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from segalign.hang_watcher import HangWatcher


def _noting(name: str) -> Any:
    """Make a hook that is an event of its run."""

    def hook(self: "HangWatch", trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if self._watcher is not None:
            self._watcher.note(name, trainer.global_step)

    hook.__doc__ = "Note that the run moves."
    return hook


class HangWatch(Callback):
    """Write the stacks of all threads of all ranks, and end the run, when nothing has moved.

    A thread of each rank looks at the main thread from time to time. It moves if a batch has begun
    or ended or a checkpoint was saved, or if it is seen at a place (a line of code, with those that
    called it) which is none of the eight different ones that it was seen at last. So a long stage
    within one hook moves, such as the making of many images, and needs to tell nobody; a collective
    that another rank never joins does not, nor does a loop that polls, such as the one that waits
    for a process that loads data. What cannot be told apart from a wait is one call into C that
    takes long: choose ``seconds`` well above the longest of them, and above what one rank does
    while others wait for it. What cannot be told from work is a loop of much Python that never
    ends.

    When the time is up, every rank writes ``RUN/logs/hang-rank-R.txt`` (an evaluation
    ``RUN/logs/STAGE/hang-rank-R.txt``, so that it disturbs no training), waits at most a minute for
    the others to do the same, and ends with exit code 71. A rank whose interpreter is held by a C
    function does so within half a minute more, with exit code 1 and without a word on stderr. So
    does, when it goes on, a process that was suspended for longer than ``seconds``.

    A rank that another one has started, as Lightning's own launcher does it, ends within 15 s of
    that one, which may have been killed; nobody else would tell it.

    It watches from the setup of a run to its end, in the training and in evaluations; that all
    ranks meet before it is PyTorch's to watch over, which waits half an hour for them.

    Args:
        seconds: How long nothing may move; null watches nothing. Less than the half hour after
            which PyTorch's own collectives fail, with the stack of a single rank or none.
    """

    def __init__(self, seconds: PositiveFloat | None = 1500) -> None:
        super().__init__()
        self.seconds = seconds
        self._watcher: HangWatcher | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watch from here on.

        Raises:
            StorageError: If the run directory cannot be written.
        """
        if self.seconds is None or getattr(trainer, "fast_dev_run", False):
            return
        self._stop()
        self._watcher = HangWatcher(
            _folder(Path(trainer.default_root_dir), stage),
            attempt=trainer.strategy.broadcast(uuid.uuid4().hex),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            seconds=self.seconds,
            launcher=_launcher() if trainer.local_rank > 0 else None,
        )
        self._watcher.start()

    on_train_batch_start: Callable[..., None] = _noting("the start of a training batch")
    on_train_batch_end: Callable[..., None] = _noting("the end of a training batch")
    on_validation_batch_start: Callable[..., None] = _noting("the start of a validation batch")
    on_validation_batch_end: Callable[..., None] = _noting("the end of a validation batch")
    on_test_batch_start: Callable[..., None] = _noting("the start of a test batch")
    on_test_batch_end: Callable[..., None] = _noting("the end of a test batch")
    on_predict_batch_start: Callable[..., None] = _noting("the start of a prediction's batch")
    on_predict_batch_end: Callable[..., None] = _noting("the end of a prediction's batch")
    on_save_checkpoint: Callable[..., None] = _noting("a checkpoint")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watch no longer."""
        self._stop()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Watch no longer: who catches the exception may go on in this process."""
        self._stop()

    def _stop(self) -> None:
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher = None


def _folder(run_dir: Path, stage: str) -> Path:
    """Name the folder of a stage's logs: an evaluation may look at a run that still trains."""
    logs, name = run_dir / "logs", TrainerFn(stage)
    return logs if name == TrainerFn.FITTING else logs / name.value


def _launcher() -> int | None:
    """Find the process that runs the same command, and so has started this one."""
    parent, num_arguments = os.getppid(), len(sys.argv) - 1
    try:
        own, other = (psutil.Process(process).cmdline() for process in (None, parent))
    except psutil.Error:
        return None
    return parent if own[-num_arguments:] == other[-num_arguments:] else None
