"""Ways to break the watch over hangs; each function breaks this process."""


def never_dumps() -> None:
    """Nothing is ever found to be still."""
    from segalign.stillness import Stillness

    Stillness.look = lambda *_: 0.0


def watches_batches_alone() -> None:
    """Only events count as movement, and none of them within a long stage."""
    from segalign import hang_watcher

    hang_watcher.place_of = lambda _: ()


def takes_polling_for_work() -> None:
    """Every look finds something new, also in a loop that waits."""
    import itertools

    from segalign import hang_watcher

    counter = itertools.count()
    hang_watcher.place_of = lambda _: (next(counter),)


def believes_every_attempt() -> None:
    """A note in the folder counts, whoever has written it."""
    from segalign.hang_watcher import HangWatcher

    def told(self):
        return (0, "then") if (self.folder / "hang.json").exists() else None

    HangWatcher._told = told


def dumps_its_own_rank_alone() -> None:
    """A rank that waits neither tells the others nor gives them time."""
    from segalign.hang_watcher import HangWatcher

    HangWatcher._tell_others = lambda *_: None
    HangWatcher._wait_for_answers = lambda _: 1


def needs_the_interpreter() -> None:
    """There is no timer outside of the interpreter."""
    from segalign.last_resort import LastResort

    LastResort.put_off = lambda *_: None


def ends_as_if_all_were_well() -> None:
    """The process ends with code 0."""
    from segalign import hang_watcher

    hang_watcher.HANG_EXIT_CODE = 0


def leaves_workers() -> None:
    """Processes that load data are neither asked for stacks nor ended."""
    from segalign import hang_watcher

    hang_watcher.multiprocessing.active_children = list
