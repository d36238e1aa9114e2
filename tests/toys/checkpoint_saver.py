"""A process that saves checkpoints until it is killed, and one that judges what is left.

Both run in forks of the command server, which has imported all.
"""

import importlib
import io
import itertools
import json
import os
import signal
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from segalign import run_directory, run_format, run_tidying

KEEP = 2
DEADLY = ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


# The side of the test


def start_job(server, log: Path, job: str, broken: tuple[str, ...] = (), **arguments: Any) -> int:
    """Call ``module.function(**arguments)`` in a fork of the command server, in place of a command.

    Returns:
        Its process id; it ends with 0 unless it fails, and then its log says why.
    """
    variables = {"TOY_JOB": json.dumps([job, arguments])}
    return server.start([], log, variables, (*broken, "checkpoint_saver.do_job"))


def check_job(server, log: Path, job: str, broken: tuple[str, ...] = (), **arguments: Any) -> None:
    """Do the same, and fail if it fails."""
    log.write_text("")
    start_job(server, log, job, broken, **arguments)
    code = server.wait()
    assert code == 0, f"{job} {arguments}: {log.read_text()}"


# The side of the process


def do_job() -> None:
    job, arguments = json.loads(os.environ["TOY_JOB"])
    module, _, function = job.rpartition(".")
    code = 1
    try:
        getattr(importlib.import_module(module), function)(**arguments)
        code = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        os._exit(code)


def make_tree(number: int, num_values: int) -> dict[str, Any]:
    """Compose the state that the save of this number stores."""
    values = torch.randn(num_values, generator=torch.Generator().manual_seed(number))
    return {
        "global_step": number,
        "state_dict": {"weight": values, "bias": values[:7]},
        "optimizer_states": [{"state": {0: {"exp_avg": 2 * values}}, "lr": 0.1}],
        "ema": {"weights": {"weight": values / 2}, "num_updates": number},
    }


def step_of(number: int, replaces: bool) -> int:
    """Name the step that a save is of: always the same one if each replaces the one before."""
    return 1 if replaces else number


def num_saved(record: Path) -> int:
    return len(record.read_bytes()) if record.exists() else 0


def hidden(run_dir: Path) -> list[str]:
    folder = run_directory.checkpoints_directory(run_dir)
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def judge(run_dir: Path, record: Path, num_values: int, replaces: bool) -> int:
    """Check that a kill has cost at most the save that was under way; return the newest's number.

    A reader comes first, then a run that starts and tidies up.
    """
    saved = num_saved(record)
    newest = run_directory.newest_checkpoint(run_dir)
    assert newest is not None or not saved, f"nothing is left of {saved} saves"
    if newest is None:
        run_tidying.remove_stale(run_dir)
        return 0
    number = check_content(newest, num_values)
    assert saved <= number <= saved + 1, f"saved {saved}, found {number}"
    listed = run_directory.list_checkpoints(run_dir)
    for path in listed:
        check_content(path, num_values)
    if not replaces:
        assert min(KEEP, saved) <= len(listed), f"saved {saved}, left {listed}"
    run_tidying.remove_stale(run_dir)
    assert hidden(run_dir) == []
    assert run_directory.newest_checkpoint(run_dir) == newest
    return number


def check_content(checkpoint: Path, num_values: int) -> int:
    """Check every tensor of a checkpoint, whole or else an error; return its number."""
    tree = run_format.load_checkpoint(checkpoint)
    number = tree["global_step"]
    expected = make_tree(number, num_values)
    assert torch.equal(tree["state_dict"]["weight"], expected["state_dict"]["weight"]), number
    assert torch.equal(tree["ema"]["weights"]["weight"], expected["ema"]["weights"]["weight"])
    exp_avg = tree["optimizer_states"][0]["state"][0]["exp_avg"]
    assert torch.equal(exp_avg, expected["optimizer_states"][0]["state"][0]["exp_avg"])
    return number


def save_on(
    run_dir: str,
    record: str,
    temporary: str,
    num_values: int,
    replaces: bool,
    die_at: int | str | None,
    num_saves: int = 10**6,
) -> None:
    """Judge what the one before has left, and save until killed; each save is a byte in a file.

    Args:
        run_dir: The run.
        record: That file.
        temporary: What ``TMPDIR`` says; nothing may ever be left there.
        num_values: Size of the state.
        replaces: Whether all saves are of the same step.
        die_at: The moment, before or after a call of the system, at which it kills itself: the
            n-th of all, or such as ``rename:4`` of one function's.
        num_saves: It ends by itself after so many.
    """
    os.environ["TMPDIR"] = tempfile.tempdir = temporary
    run, file = Path(run_dir), Path(record)
    number = judge(run, file, num_values, replaces)
    if num_saves == 0:
        assert list(Path(temporary).iterdir()) == [], "something is left in TMPDIR"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if num_saved(file) < number:  # it was killed between the save and its record
        os.write(descriptor, b".")
    if die_at is not None:
        die_at_moment(die_at)
    for each in itertools.count(number + 1):
        if num_saves < each - number:
            break
        path = run_directory.checkpoint_path(run, step_of(each, replaces))
        run_format.save_checkpoint(make_tree(each, num_values), path)
        os.write(descriptor, b".")
        run_tidying.prune_checkpoints(run, KEEP)
        assert len(run_directory.list_checkpoints(run)) <= KEEP


def die_at_moment(wanted: int | str) -> None:
    """Kill this process at the n-th moment right before or after a call that changes a disk."""
    only, _, count = str(wanted).rpartition(":")
    moments = itertools.count(1)

    def pass_moment() -> None:
        if next(moments) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)

    for owner, name in disk_calls():
        original = getattr(owner, name)

        def deadly(*arguments, original=original, **options):
            pass_moment()
            result = original(*arguments, **options)
            pass_moment()
            return result

        if only in ("", name):
            setattr(owner, name, deadly)


def disk_calls() -> Iterator[tuple[Any, str]]:
    """List the functions by which a save changes a disk."""
    yield from ((os, name) for name in DEADLY)
    yield io, "open"
    yield run_format, "save_file"


# What Lightning does by default


def overwrite_last(path: str, temporary: str, num_values: int) -> None:
    """Overwrite a ``last.ckpt`` as Lightning does, until killed; ``path.saved`` counts."""
    from lightning.fabric.plugins.io import TorchCheckpointIO

    os.environ["TMPDIR"] = tempfile.tempdir = temporary
    plugin = TorchCheckpointIO()
    with Path(f"{path}.saved").open("ab", buffering=0) as record:
        for number in itertools.count(1):
            plugin.save_checkpoint(make_tree(number, num_values), path)
            record.write(b".")
