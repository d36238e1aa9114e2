"""Stop at a step boundary when a cluster says that it takes the machine away, and requeue."""

import signal as signals
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import distributed
from typing_extensions import override

from callbacks.checkpoint import RunCheckpoint
from callbacks.signal_flag import SignalFlag, ignore
from segalign.errors import ConfigError, PreemptedError
from segalign.launch.slurm.requeue import RequeueOutcome, requeue, slurm_job


class Preemption(Checkpoint):
    """Answer a signal with a checkpoint, a requeue, and exit code 85.

    The signal's handler only sets a flag. At the end of an optimizer step, and after every batch of
    a validation, the ranks agree whether any of them has been told; then all stop at this very
    step. A checkpoint of it is saved, unless there is one, and rank 0 puts the SLURM job back into
    its queue. A resumed run goes on as if nothing had happened: what a stop has cut off, such as a
    validation, is made up for. It works without SLURM too: ``kill -USR1 PID``.

    With several ranks, SIGTERM that is not the signal ends a rank at once, and so all of them.

    Lightning takes it for a checkpoint callback, and therefore calls it after all others: what it
    saves holds what they have done at this step.

    Args:
        signal: What the cluster sends before it takes the machine away; null answers none.
        requeue: Put the SLURM job back into its queue, once all is saved.
        max_requeues: How often a job may be put back.
        every_n_steps: Agree every so many optimizer steps. With hundreds of ranks and short steps,
            a few are cheaper; the signal must then come that much earlier.
    """

    def __init__(
        self,
        signal: Literal["USR1", "USR2", "TERM"] | None = None,
        requeue: bool = True,
        max_requeues: NonNegativeInt = 20,
        every_n_steps: PositiveInt = 1,
    ) -> None:
        super().__init__()
        self.signal = signal
        self.requeue = requeue
        self.max_requeues = max_requeues
        self.every_n_steps = every_n_steps
        self._flag: SignalFlag | None = None
        self._group: Any = None
        self._seen_step = 0
        self._num_shared_batches = 0
        self._stop: PreemptedError | None = None

    # Listening

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen from here on, so that loading may take its time.

        Raises:
            ConfigError: If a job that comes back would start over.
        """
        if trainer.world_size > 1:
            _leave_sigterm_alone(trainer)
        if self.signal is None or stage != "fit" or getattr(trainer, "fast_dev_run", False):
            return
        if self.requeue and _checkpoints(trainer).overwrite and slurm_job() is not None:
            raise ConfigError(
                "expected a job that is requeued to go on where it was; `checkpoint.overwrite` is "
                "true, and it would start over. Set it to false, or `preemption.requeue: false`."
            )
        self._flag = SignalFlag(signals.Signals[f"SIG{self.signal}"])
        self._flag.listen()
        if self.signal == "TERM":
            _leave_sigterm_alone(trainer)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Meet the other ranks on the CPU, so that no answer waits for a GPU.

        Raises:
            ConfigError: If they cannot be reached so.
        """
        if self._flag is not None and trainer.world_size > 1:
            self._group = _meet()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before the first step, if the signal has come by now."""
        self._seen_step = trainer.global_step
        if self._flag is not None:
            self._flag.listen()
            if self._is_told():
                raise self._answer(trainer, None)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen no longer."""
        if self._flag is not None:
            self._flag.stop()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Listen no longer; but in a process that stops, no signal may change its exit code."""
        if self._flag is not None and self._stop is None:
            self._flag.stop()

    # Stopping

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save and requeue after an optimizer step; stop as soon as that step has been logged."""
        every, step, seen_step = self.every_n_steps, trainer.global_step, self._seen_step
        self._seen_step = step
        # Steps are counted alike on all ranks, whatever each of them has been told.
        if step // every > seen_step // every and self._is_told():
            self._answer(trainer, _checkpoints(trainer).save_step(trainer))

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before a validation; see how many batches of it all ranks have."""
        self._raise_if_stopped()
        if self._flag is None or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        num_batches = sum(trainer.fit_loop.epoch_loop.val_loop.max_batches)
        told, fewest = self._agree(-min(num_batches, 2.0**31))
        self._num_shared_batches = int(-fewest)
        self._stop_in_validation(trainer, is_told=told > 0)

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop in a validation, which a resumed run repeats; ranks with more batches wait."""
        if self._num_shared_batches > 0:
            self._num_shared_batches -= 1
            self._stop_in_validation(trainer, is_told=self._is_told())

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop after a validation, whose images may have taken long."""
        if self._flag is None or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._num_shared_batches = 0
        self._stop_in_validation(trainer, is_told=self._is_told())

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop before the next step."""
        self._raise_if_stopped()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before the training ends; a resumed run ends it."""
        self._raise_if_stopped()

    def _raise_if_stopped(self) -> None:
        if self._stop is not None:
            raise self._stop

    def _stop_in_validation(self, trainer: pl.Trainer, *, is_told: bool) -> None:
        if not is_told:
            return
        checkpoint = _checkpoints(trainer).save_step(trainer)
        if checkpoint is not None:  # else a step is under way, and its end comes first
            raise self._answer(trainer, checkpoint)

    # Agreeing

    def _is_told(self) -> bool:
        return self._flag is not None and self._agree(0)[0] > 0

    def _agree(self, number: float) -> tuple[float, float]:
        """Return whether any rank has been told, and the largest of the ranks' numbers."""
        assert self._flag is not None
        own = torch.tensor([float(self._flag.is_set), number], dtype=torch.float64)
        if self._group is not None:
            distributed.all_reduce(own, op=distributed.ReduceOp.MAX, group=self._group)
        return float(own[0]), float(own[1])

    def _answer(self, trainer: pl.Trainer, checkpoint: Path | None) -> PreemptedError:
        """Requeue on rank 0 and say what was done, on every rank the same."""
        assert self._flag is not None
        ignore(self._flag.number)
        ignore(signals.SIGTERM)  # which ends a job that is requeued
        keep_handlers(trainer)
        let_children_end(trainer)
        told: list[RequeueOutcome | None] = [None]
        if self._group is not None:
            distributed.barrier(self._group)
        if trainer.is_global_zero and self.requeue:
            told[0] = requeue(self.max_requeues)
        if self._group is not None:
            distributed.broadcast_object_list(told, src=0, group=self._group)
        line = _say(self._flag.number.name, trainer.global_step, checkpoint, told[0])
        self._stop = PreemptedError(line)
        return self._stop


def _meet() -> Any:
    try:
        return distributed.new_group(backend="gloo")
    except RuntimeError as error:
        said = (str(error).strip().splitlines() or ["nothing"])[0]
        raise ConfigError(
            "expected the ranks to reach each other over Gloo, to agree when a signal comes; it "
            f"says: {said}. Often a host name stands for 127.0.0.1: set GLOO_SOCKET_IFNAME to the "
            "network interface that joins the nodes, such as `eth0`, or `preemption.signal: null`."
        ) from error


def _say(name: str, step: int, checkpoint: Path | None, outcome: RequeueOutcome | None) -> str:
    """Write the line that the user gets."""
    if checkpoint is None:
        parts = [f"{name} came before step {step + 1}, and there is nothing new to save"]
    else:
        parts = [f"{name} came, and training ended after step {step}, saved in `{checkpoint}`"]
    if outcome is not None and outcome.job is not None:
        parts.append(str(outcome))
    if outcome is None or not outcome.requeued:
        parts.append("go on with `--ckpt_path auto`")
    return "; ".join(parts)


def _checkpoints(trainer: pl.Trainer) -> RunCheckpoint:
    callbacks = trainer.checkpoint_callbacks
    return next(callback for callback in callbacks if isinstance(callback, RunCheckpoint))


def keep_handlers(trainer: pl.Trainer) -> None:
    """Keep Lightning from putting back the handlers of before: they would end this process."""
    trainer._signal_connector._original_handlers = {}


def let_children_end(trainer: pl.Trainer) -> None:
    """Keep Lightning from killing this process because those that it started end with a code."""
    launched: list[Any] = getattr(trainer.strategy.launcher, "procs", [])
    launched.clear()


def _leave_sigterm_alone(trainer: pl.Trainer) -> None:
    """Keep Lightning from handling SIGTERM.

    Its handler talks to the other ranks, wherever they may be, and all wait for each other. A rank
    that does not listen to SIGTERM ends by it at once, and the others as after any other death.
    """
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = _register_nothing


def _register_nothing() -> None:
    """Stand in for a registration of handlers."""
