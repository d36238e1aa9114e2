"""Ways to write checkpoints that lose them."""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path

from segalign import appended_file, atomic, run_directory, run_format, run_tidying


def writes_in_place():
    """Writes the files of a checkpoint into its directory, without a temporary one."""

    def save(tree, directory):
        directory.mkdir(parents=True, exist_ok=True)
        _fill(tree, directory)

    run_format.save_checkpoint = save


def writes_elsewhere_and_copies():
    """Writes into ``TMPDIR``, maybe on another file system, and copies from there."""

    def save(tree, directory):
        temporary = Path(tempfile.mkdtemp())
        _fill(tree, temporary)
        shutil.copytree(temporary, directory, dirs_exist_ok=True)
        shutil.rmtree(temporary)

    run_format.save_checkpoint = save


def _fill(tree, directory):
    document, tensors = run_format.encode_tree(tree)
    for stem, named in tensors.items():
        run_format._write_tensors(directory / f"{stem}.safetensors", named)
    (directory / "state.json").write_text(json.dumps(document))
    meta = {"format_version": 1, "files": run_directory.describe_files(directory)}
    (directory / "meta.json").write_text(json.dumps(meta))


def renames_before_sync():
    """Renames before the bytes are on disk."""
    delayed = []
    run_format.sync_file = lambda path: delayed.append(path.name)
    sync_directory = run_format.sync_directory
    run_format.sync_directory = lambda path: None
    move = run_format.move_directory_into_place

    def move_and_sync(temporary, target):
        move(temporary, target)
        for name in delayed:
            atomic.sync_file(target / name)
        sync_directory(target)
        delayed.clear()

    run_format.move_directory_into_place = move_and_sync


def never_syncs_names():
    """Forces files to disk, but not the directory that names them."""
    atomic.sync_directory = run_format.sync_directory = lambda path: None


def forgets_new_parents():
    """Creates the directory of all checkpoints without forcing its own name to disk."""
    run_format.make_directory = lambda path, _: path.mkdir(parents=True, exist_ok=True)


def checks_no_digest():
    """Takes a checkpoint for whole whose files have their sizes."""
    verify = run_directory.verify_checkpoint
    run_directory.verify_checkpoint = lambda directory, **_: verify(directory, digests=False)


def prunes_first():
    """Makes room before the new checkpoint stands."""
    save = run_format.save_checkpoint

    def prune_and_save(tree, directory):
        run_tidying.prune_checkpoints(directory.parents[1], 1)
        save(tree, directory)

    run_format.save_checkpoint = prune_and_save


def keeps_one():
    """Keeps the newest checkpoint alone."""
    prune = run_tidying.prune_checkpoints
    run_tidying.prune_checkpoints = lambda run_dir, keep: prune(run_dir, 1)


def prunes_by_name():
    """Counts damaged checkpoints among those that it keeps."""
    run_tidying._seems_whole = lambda checkpoint: True


def never_brings_back():
    """Leaves a checkpoint without its name whose replacement was cut off."""
    run_directory.bring_back = atomic.bring_back = lambda parent: None


def leaves_the_stale():
    """Never removes what killed processes have left."""
    run_tidying.recover_directory = lambda parent: []


def swallows_a_full_disk():
    """Goes on as if a file that found no room had been written."""

    @contextlib.contextmanager
    def silent(path, num_bytes=None):
        with contextlib.suppress(OSError):
            yield

    atomic.storage_errors = run_format.storage_errors = silent
    appended_file.storage_errors = silent


def leaves_half_of_a_failed_save():
    """Leaves what was written until the disk was full."""
    run_format.shutil = Untidy()
    Path.unlink = lambda self, missing_ok=False: None


class Untidy:
    """Stands in for ``shutil``, and deletes nothing."""

    def rmtree(self, path, **options):
        pass


def puts_nothing_back():
    """Leaves a checkpoint aside if its replacement fails after the first rename."""

    def take_place(temporary, target):
        replaced = None
        if target.exists():
            replaced = atomic.temporary_sibling(target, atomic.REPLACED_MARK)
            os.rename(target, replaced)  # noqa: PTH104
        os.rename(temporary, target)  # noqa: PTH104
        return replaced

    atomic._take_place = take_place
    never_brings_back()


def raises_on_rank_zero_alone():
    """Lets the other ranks go on when the first finds no room."""
    from callbacks import failed_saves, rank_zero

    for module in (failed_saves, rank_zero):
        module.together = lambda work: work()


def tolerates_for_ever():
    """Never ends a run whose checkpoints find no room."""
    from callbacks import failed_saves

    init = failed_saves.FailedSaves.__init__
    failed_saves.FailedSaves.__init__ = lambda self, at_most: init(self, 10**6)


def loses_rows():
    """Forgets the rows of a log that found no room."""
    from callbacks import run_loggers

    write = run_loggers.RunCSVLogger._write

    def write_or_forget(self, *, sync):
        try:
            write(self, sync=sync)
        except OSError:
            self._waiting.clear()

    run_loggers.RunCSVLogger._write = write_or_forget


def raises_in_mid_step():
    """Ends rank 0 where Lightning saves the loggers and their disk is full."""
    from callbacks import run_loggers, tensorboard_log

    for logger in (run_loggers.RunCSVLogger, tensorboard_log.RunTensorBoardLogger):
        logger.save = logger.flush_all


def allows_any_change():
    """Goes on with any settings."""
    from lightning_modules import resume_checks

    resume_checks.changed_settings = lambda stored, current: itertools.repeat(None, 0)
