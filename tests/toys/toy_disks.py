"""Disks that are small, full, or fail at a chosen call."""

import contextlib
import itertools
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
from checkpoint_saver import check_content, disk_calls, hidden, make_tree
from lightning.pytorch.callbacks import Callback

from callbacks.run_loggers import RunCSVLogger, run_loggers
from segalign import atomic, run_directory, run_format, run_tidying
from segalign.errors import FullDiskError

NUM_VALUES = 2000
FILLER = "filler"
HARMLESS = ("unlink", "rmdir")  # calls that need no room


# The side of the test


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount a file system of so many bytes; as another user than root, in a namespace of its own.

    Raises:
        OSError: If the system does not let it be mounted.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if not subprocess.run(mount, capture_output=True, check=False).returncode:
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    script = f"{' '.join(mount)} && echo mounted && exec cat"
    holder = subprocess.Popen(
        ["unshare", "-rm", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        if holder.stdout.readline() != "mounted\n":
            raise OSError("neither `mount` nor `unshare -rm` is permitted here")
        # Others reach the namespace of a process through its root.
        yield Path(f"/proc/{holder.pid}/root{folder}")
    finally:
        holder.communicate()


# The side of the process: a run's files


def save_first(run_dir: Path) -> Path:
    """Save the checkpoint that must survive, and the small files of a run."""
    path = run_directory.checkpoint_path(run_dir, 1)
    run_format.save_checkpoint(make_tree(1, NUM_VALUES), path)
    write_small_files(run_dir, 1)
    return path


def write_small_files(run_dir: Path, step: int) -> None:
    record = run_directory.BestRecord(step, "val/reward", 0.5, "max")
    run_directory.write_best(run_dir, record)
    for name in ("checkpoints/followed.json", "run.json", "config.yaml", "data_report.json"):
        atomic.write_text_atomic(run_dir / name, f"{step}\n" * 100)


def small_contents(run_dir: Path) -> dict[str, bytes]:
    found = [*run_dir.glob("*"), *run_dir.glob("checkpoints/*")]
    return {path.name: path.read_bytes() for path in found if path.is_file()}


def judge(run_dir: Path, number: int) -> None:
    """Check that a failed write has left what was there, and nothing besides."""
    newest = run_directory.newest_checkpoint(run_dir)
    assert newest is not None, "no checkpoint is left"
    assert check_content(newest, NUM_VALUES) == number
    assert hidden(run_dir) == [], hidden(run_dir)
    assert [p for p in run_dir.rglob("*") if ".tmp-" in p.name] == []


def check_line(error: FullDiskError, name: str) -> None:
    line = str(error)
    assert "\n" not in line
    assert name in line, line
    assert "bytes are needed" in line, line
    assert "bytes are free there" in line, line
    assert type(error).exit_code == 75


def try_to_save(run_dir: Path, step: int) -> bool:
    """Save the second checkpoint; return whether there was room for it."""
    path = run_directory.checkpoint_path(run_dir, step)
    try:
        run_format.save_checkpoint(make_tree(2, NUM_VALUES), path)
    except FullDiskError as error:
        check_line(error, "/checkpoints")
        judge(run_dir, 1)
        return False
    judge(run_dir, 2)
    return True


def try_small_files(run_dir: Path) -> bool:
    """Write each small file anew; return whether there was room for all."""
    before = small_contents(run_dir)
    try:
        write_small_files(run_dir, 2)
    except FullDiskError as error:
        check_line(error, str(run_dir))
        now = small_contents(run_dir)
        for name, content in before.items():
            # Those that came before the failure are new, all others old.
            assert now[name] in (content, content.replace(b"1", b"2")), name
        assert [p for p in run_dir.rglob("*") if ".tmp-" in p.name] == []
        return False
    return True


def check_limits(folder: str, limits: list[int], replaces: bool) -> None:
    """Save under limits of file sizes, so that writes end with EFBIG at every point."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    outcomes = set()
    for limit in limits:
        run_dir = Path(folder) / str(limit)
        save_first(run_dir)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            outcomes.add(try_to_save(run_dir, 1 if replaces else 2))
            outcomes.add(try_small_files(run_dir))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        shutil.rmtree(run_dir)
    assert outcomes == {True, False}, outcomes


def check_small_disk(folder: str, spaces: list[int]) -> None:
    """Save while a disk has so many bytes left, from none to enough."""
    outcomes = set()
    for space in spaces:
        run_dir = Path(folder) / "run"
        save_first(run_dir)
        fill(Path(folder), space)
        small = try_small_files(run_dir)
        saved = try_to_save(run_dir, 2)
        assert small or not saved, f"with {space} bytes"
        outcomes |= {(small, saved)}
        (Path(folder) / FILLER).unlink()
        if not saved:
            # With room again, it goes on as if nothing had been.
            assert try_to_save(run_dir, 2)
        shutil.rmtree(run_dir)
    assert {(False, False), (True, True)} <= outcomes, outcomes


def fill(folder: Path, left: int) -> None:
    """Fill a disk until so many bytes are left."""
    free = shutil.disk_usage(folder).free
    (folder / FILLER).write_bytes(b"\0" * max(free - left, 0))


def check_failing_calls(folder: str, lasts: bool, replaces: bool, code: int) -> None:
    """Let the k-th call that changes a disk fail, or all from there on, for every k."""
    for wanted in itertools.count(1):
        run_dir = Path(folder) / f"{wanted}"
        save_first(run_dir)
        with failing_calls(wanted, lasts, code) as (calls, failed):
            path = run_directory.checkpoint_path(run_dir, 1 if replaces else 2)
            try:
                run_format.save_checkpoint(make_tree(2, NUM_VALUES), path)
                number = 2
            except FullDiskError as error:
                check_line(error, "/checkpoints")
                number = 1
        is_over = next(calls) <= wanted
        # Others are cured, such as a probe for a way to open a file; the content is checked anyway.
        is_serious = not {"fsync", "rename", "save_file"}.isdisjoint(failed)
        is_tidying = replaces and failed == ["rename"]
        assert number == 1 or not is_serious or is_tidying, f"call {wanted} failed unseen"
        try:
            judge(run_dir, judge_standing(run_dir, number) if lasts else number)
        except AssertionError as error:
            raise AssertionError(f"call {wanted}: {error}") from error
        if is_over:
            assert wanted > 8, "no call was seen"
            return
        shutil.rmtree(run_dir)


def judge_standing(run_dir: Path, number: int) -> int:
    """Check what a save has left that could not even be undone; return what may now be there."""
    newest = run_directory.newest_checkpoint(run_dir)
    assert newest is not None, "no checkpoint is left"
    run_tidying.remove_stale(run_dir)  # as the next start does
    return max(number, check_content(newest, NUM_VALUES))


@contextlib.contextmanager
def failing_calls(wanted: int, lasts: bool, code: int):
    calls = itertools.count(1)
    failed: list[str] = []
    originals = [(owner, name, getattr(owner, name)) for owner, name in disk_calls()]

    def failing(name, original):
        def call(*arguments, **options):
            number = next(calls)
            if number == wanted or (lasts and number > wanted):
                failed.append(name)
                raise OSError(code, os.strerror(code))
            return original(*arguments, **options)

        return call

    for owner, name, original in originals:
        if name not in HARMLESS and not (name == "open" and owner is os):
            setattr(owner, name, failing(name, original))
    try:
        yield calls, failed
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def check_logs(folder: str, spaces: list[int]) -> None:
    """Log while a disk has so many bytes left: nothing is said in between, and nothing is lost."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for space in spaces:
        run_dir = Path(folder) / "run"
        loggers = run_loggers(run_dir, "fit", 0)
        log(loggers, range(40))
        for logger in loggers:
            logger.save()
        fill(Path(folder), space)
        log(loggers, range(40, 1000))
        failed = 0
        for logger in loggers:
            try:
                logger.flush_all()
            except FullDiskError as error:
                check_line(error, f"{run_dir}/logs/")
                failed += 1
        assert failed > 0, f"with {space} bytes"
        (Path(folder) / FILLER).unlink()
        log(loggers, range(1000, 1040))
        for logger in loggers:
            logger.finalize("success")
        rows = RunCSVLogger(run_dir / "logs")._read()
        assert [int(row["step"]) for row in rows] == list(range(1040))
        (events,) = (run_dir / "logs").glob("events.out.tfevents.*")
        steps = [e.step for e in EventFileLoader(str(events)).Load() if e.HasField("summary")]
        assert sorted(set(steps)) == list(range(1040))
        shutil.rmtree(run_dir)


def log(loggers, steps) -> None:
    for step in steps:
        for logger in loggers:
            logger.log_metrics({"train/loss": step / 7}, step)
            logger.save()  # as Lightning does


# The side of a run


class FillDisk(Callback):
    """Fill the disk of the run directory after one step, and empty it after another."""

    def __init__(self, at_step: int, left: int = 0, empty_at: int = -1):
        super().__init__()
        self.at_step, self.left, self.empty_at = at_step, left, empty_at

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx):
        folder = Path(trainer.default_root_dir).parent
        if trainer.is_global_zero and trainer.global_step == self.at_step:
            fill(folder, self.left)
        if trainer.is_global_zero and trainer.global_step == self.empty_at:
            (folder / FILLER).unlink()
