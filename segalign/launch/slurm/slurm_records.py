"""What a study's folder knows of its jobs.

::

    FOLDER/jobs/001.runs       run directories, one on each line: what the job's tasks do
    FOLDER/jobs/001.sbatch     its script
    FOLDER/jobs/001.json       its record
    FOLDER/jobs/001-0.out      what its task 0 printed
    FOLDER/jobs/lock           held by whoever submits or cancels

The record is written before the job is submitted, at first without a number. A job of such a
record is found in the queue by the path of its script, so that a submission which is killed half
way is neither lost nor made twice.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from segalign.atomic import make_directory, storage_errors, write_text_atomic
from segalign.errors import DataError
from segalign.json_text import parse_json
from segalign.launch.running.run_lock import take_lock
from segalign.launch.running.run_state import FINISHED, read_state
from segalign.launch.slurm.slurm_commands import ClusterError

_LOCK_SECONDS = 150.0
_LOCK_POLL_SECONDS = 0.1
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A submitted array job.

    Attributes:
        job_id: SLURM's number; None while it is not known.
        runs: Run directories, in the order of the job's tasks.
        runs_per_task: How many of them each task does.
        user: Number of the user who submitted it.
        time: When, ISO 8601 in UTC.
    """

    job_id: str | None
    runs: tuple[str, ...]
    runs_per_task: int
    user: int
    time: str

    def runs_of(self, task: int) -> list[Path]:
        """Return the run directories of a task."""
        first = task * self.runs_per_task
        return [Path(run) for run in self.runs[first : first + self.runs_per_task]]

    @property
    def is_over(self) -> bool:
        """Whether all of its runs are finished, whatever the queue says."""
        states = (read_state(Path(run)) for run in self.runs)
        return all(state is not None and state.status in FINISHED for state in states)

    def save(self, path: Path) -> None:
        """Write the record, whole or not at all.

        Raises:
            StorageError: If it cannot be written.
        """
        write_text_atomic(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a record.

        Raises:
            DataError: If it cannot be read.
        """
        try:
            content = parse_json(path.read_bytes())
            return cls(**{**content, "runs": tuple(content["runs"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"expected the record of a SLURM job in `{path}`; it cannot be read: {error}. "
                "Delete it once `squeue` shows that the job is over."
            ) from error


def jobs_folder(folder: Path) -> Path:
    """Name the folder of a study's jobs."""
    return folder / "jobs"


def script_file(record: Path) -> Path:
    """Name a job's script, as the queue shows it."""
    return record.with_suffix(".sbatch").absolute()


def load_records(folder: Path) -> dict[Path, JobRecord]:
    """Read the records of a study, the oldest first.

    Raises:
        DataError: If one cannot be read.
    """
    paths = sorted(jobs_folder(folder).glob("[0-9]*.json"), key=_number)
    return {path: JobRecord.load(path) for path in paths}


def next_record_file(folder: Path) -> Path:
    """Name the record of the next job."""
    numbers = [_number(path) for path in jobs_folder(folder).glob("[0-9]*.json")]
    return jobs_folder(folder) / f"{max(numbers, default=0) + 1:03d}.json"


@contextlib.contextmanager
def jobs_lock(folder: Path) -> Iterator[int]:
    """Keep other commands from submitting or cancelling jobs of the study.

    On a file system without locks nobody is kept out, which is logged.

    Yields:
        The locked file's descriptor. A process that inherits it holds the lock too.

    Raises:
        ClusterError: If another command holds it for long.
        StorageError: If the folder cannot be written.
    """
    make_directory(jobs_folder(folder))
    path = jobs_folder(folder) / "lock"
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with storage_errors(path):
            is_taken = take_lock(descriptor, _LOCK_SECONDS, poll=_LOCK_POLL_SECONDS)
        if is_taken is False:
            raise ClusterError(
                f"expected to submit or cancel jobs; another command holds `{path}` for "
                f"{_LOCK_SECONDS:.0f} s. Try again when it has ended."
            )
        if is_taken is None:
            _logger.warning(
                "`%s` is on a file system without locks: submit jobs of this study from one "
                "command at a time",
                path,
            )
        yield descriptor
    finally:
        os.close(descriptor)


def _number(path: Path) -> int:
    digits = path.stem
    return int(digits) if digits.isdigit() else 0
