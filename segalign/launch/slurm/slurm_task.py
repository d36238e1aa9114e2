"""What a task of an array job does: its runs, one after another."""

import sys
from collections.abc import Sequence
from pathlib import Path

from segalign.errors import DataError, PreemptedError, SegalignError
from segalign.launch.running.execute import execute_run
from segalign.launch.running.stopping import StopRequest, signal_named


def run_task(
    runs_file: Path,
    task: int,
    program: Sequence[str],
    *,
    runs_per_task: int = 1,
    launcher: Sequence[str] = (),
    options: Sequence[str] = (),
    preempting_signal: str | None = None,
    max_requeues: int = 20,
) -> int:
    """Make the runs of a task; one that fails or is cancelled keeps no other from starting.

    Runs that are finished end at once, so that a task which is put back into the queue goes on
    where it was.

    Args:
        runs_file: File with a run directory on each line.
        task: Number of the task, from 0.
        program: Command line of ``main.py``.
        runs_per_task: Lines of the file for each task.
        launcher: What starts the processes of a run, such as ``srun``.
        options: Arguments that every run gets.
        preempting_signal: What the cluster sends before it takes the nodes away.
        max_requeues: How often the task may be put back into the queue.

    Returns:
        0 if all ended well, 85 if the task was stopped by a signal, else the code of the first run
        that failed.

    Raises:
        DataError: If the file cannot be read, or has no line for the task.
    """
    announced = None if preempting_signal is None else signal_named(preempting_signal)
    failure = 0
    # One for all runs: a signal may come between two of them.
    with StopRequest(announced) as stop:
        for run_dir in _runs(runs_file, task, runs_per_task):
            try:
                code = execute_run(
                    run_dir,
                    program,
                    launcher=launcher,
                    options=options,
                    preempting_signal=preempting_signal,
                    max_requeues=max_requeues,
                    stop=stop,
                )
            except SegalignError as error:
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
                code = error.exit_code
            if code == PreemptedError.exit_code or stop.signal is not None:
                return PreemptedError.exit_code
            failure = failure or code
    return failure


def _runs(runs_file: Path, task: int, runs_per_task: int) -> list[Path]:
    try:
        lines = runs_file.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise DataError(
            f"expected run directories in `{runs_file}`; it cannot be read: {error}. "
            "`python main.py sweep resume STUDY` submits a new job."
        ) from error
    mine = lines[task * runs_per_task : (task + 1) * runs_per_task]
    if not mine:
        raise DataError(
            f"expected a run for task {task} in `{runs_file}`; it has {len(lines)} lines, "
            f"{runs_per_task} for each task. `python main.py sweep resume STUDY` submits a new job."
        )
    return [Path(line) for line in mine]
