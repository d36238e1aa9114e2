"""Ways to break the answer to a signal; each function breaks this process."""


def asks_twice() -> None:
    """The job is put back twice."""
    from callbacks import preemption

    asked = preemption.requeue
    preemption.requeue = lambda *arguments: (asked(*arguments), asked(*arguments))[1]


def ends_at_once() -> None:
    """The handler ends the process, with the right code and nothing saved."""
    import os

    from callbacks.signal_flag import SignalFlag

    SignalFlag._note = lambda *_: os._exit(85)


def saves_in_the_handler() -> None:
    """The handler takes the step under way for done, saves, asks to come back, and ends the run."""
    import signal

    from callbacks import preemption
    from callbacks.preemption import Preemption
    from callbacks.signal_flag import SignalFlag
    from segalign.errors import PreemptedError
    from segalign.run_directory import checkpoint_path

    trainers = []
    setup = Preemption.setup

    def remember(self, trainer, pl_module, stage):
        trainers.append(trainer)
        setup(self, trainer, pl_module, stage)

    def save(*_):
        from pathlib import Path

        (trainer,) = trainers
        run_dir = Path(trainer.default_root_dir)
        progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
        progress.optimizer.step.increment_completed()
        trainer.save_checkpoint(checkpoint_path(run_dir, trainer.global_step))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which ends a job that is put back
        preemption.requeue(20)
        raise PreemptedError("stopped in the handler")

    Preemption.setup = remember
    SignalFlag._note = save


def agrees_with_nobody() -> None:
    """A rank stops when it has been told, whatever the others know."""
    from callbacks.preemption import Preemption

    Preemption._agree = lambda self, number: (float(self._flag.is_set), number)


def forgets_the_validation() -> None:
    """A checkpoint does not say that a validation is due."""
    from callbacks.unfinished_step import UnfinishedStep

    store = UnfinishedStep.store

    def forget(self, trainer, checkpoint):
        store(self, trainer, checkpoint)
        assert "validation_due" in checkpoint
        checkpoint["validation_due"] = False

    UnfinishedStep.store = forget


def talks_in_the_handler() -> None:
    """Lightning's handler of SIGTERM, which waits for the other ranks, is left in place."""
    from callbacks import preemption

    preemption._leave_sigterm_alone = lambda trainer: None


QUICK = ("broken_signals.asks_twice", "broken_signals.ends_at_once")
# The number of ranks, and what is found.
LONG = {
    "broken_signals.saves_in_the_handler": (1, "losses differ"),
    "broken_signals.forgets_the_validation": (1, "rows are missing"),
    "broken_signals.agrees_with_nobody": (2, "blocked"),
}
