"""Ways to break what makes the death of a rank harmless; each function breaks this process."""


def follows_nobody() -> None:
    """A rank does not look at the process that has started it."""
    from callbacks import hang_watch

    hang_watch._launcher = lambda: None


def looks_at_the_launcher_and_goes_on() -> None:
    """A rank sees that its launcher is gone, and stays."""
    from segalign.hang_watcher import HangWatcher

    HangWatcher._leave = lambda self, line: None


def draws_go_on() -> None:
    """Random numbers of a step depend on those that were drawn before it."""
    from callbacks.step_rng import StepRng

    StepRng.on_train_batch_start = lambda *_: None


def waits_for_the_dead() -> None:
    """A rank whose collective fails waits for the others before it ends."""
    import time

    from lightning.pytorch.strategies import DDPStrategy

    DDPStrategy.on_exception = lambda *_: time.sleep(1000)


BUSY = ("broken_rank_death.follows_nobody", "broken_rank_death.looks_at_the_launcher_and_goes_on")
# What is found, too.
RESUMED = {
    "broken_rank_death.draws_go_on": "losses differ",
    "broken_rank_death.waits_for_the_dead": "lived on",
}
