"""An attempt is made by whoever creates its file first, even where a file system has no locks.

Pure standard library.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from segalign.atomic import storage_errors
from segalign.launch.running.run_folder import sweep_folder
from segalign.launch.running.run_lock import held_elsewhere

_PREFIX: Final = "attempt-"
_SUFFIX: Final = ".claim"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Who makes an attempt.

    Attributes:
        attempt: Its number, from 1.
        host: Where.
        job: In which SLURM job, if it is in one.
    """

    attempt: int
    host: str = ""
    job: str | None = None


def claim_attempt(run_dir: Path, claim: Claim) -> None:
    """Claim an attempt.

    Raises:
        RunHeldError: If another process has claimed it.
        StorageError: If it cannot be written down.
    """
    path = _file(run_dir, claim.attempt)
    with storage_errors(path):
        try:
            file = path.open("x")
        except FileExistsError as error:
            raise held_elsewhere(run_dir) from error
        try:
            with file:
                file.write(f"{claim.host}\n{claim.job or ''}\n")
        except OSError:
            path.unlink(missing_ok=True)
            raise


def newest_claim(run_dir: Path) -> Claim | None:
    """Find the claim of the last attempt; None if there has been none."""
    numbers = [
        path.stem.removeprefix(_PREFIX) for path in sweep_folder(run_dir).glob(f"*{_SUFFIX}")
    ]
    attempt = max((int(number) for number in numbers if number.isdecimal()), default=None)
    if attempt is None:
        return None
    # It may not be written yet, by whoever it is.
    lines: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        lines = _file(run_dir, attempt).read_text().splitlines()
    host, job = (*lines, "", "")[:2]
    return Claim(attempt=attempt, host=host, job=job or None)


def _file(run_dir: Path, attempt: int) -> Path:
    return sweep_folder(run_dir) / f"{_PREFIX}{attempt}{_SUFFIX}"
