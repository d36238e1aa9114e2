"""Ask SLURM, and turn what it refuses into one line."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Final

from segalign.errors import ConfigError, SegalignError

# Longer than SLURM's own attempts to reach a controller that does not answer.
_SECONDS = 120.0
# Settings of commands, and what an allocation says of itself to those that are called inside it.
_FOREIGN: Final = ("SBATCH_", "SCANCEL_", "SCONTROL_", "SLURM_", "SQUEUE_", "SRUN_")
# Which cluster, and who asks.
_KEPT: Final = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
_SPEAKER = re.compile(r"^\w+: (error|fatal): ")


class ClusterError(SegalignError):
    """A cluster that does not answer (exit code 69, ``EX_UNAVAILABLE``)."""

    exit_code = 69


class CommandFailedError(Exception):
    """What a command of SLURM said when it failed, on one line."""


def require_sbatch() -> None:
    """Check that jobs can be submitted from here.

    Raises:
        ConfigError: If SLURM's commands are missing.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "expected the command `sbatch` for `--slurm`; found none. Run this on a login node of "
            "a SLURM cluster, or use `--local N`, which makes N runs at a time on this machine."
        )


def call(*command: str, pass_fds: Sequence[int] = ()) -> str:
    """Run a command of SLURM and return what it prints.

    Settings in the environment do not count, so that a user's profile hides no job, and an
    allocation from which a job is submitted is not taken for the job's own.

    Args:
        command: The command line.
        pass_fds: Open files that it keeps open, such as a lock, should this process die.

    Raises:
        CommandFailedError: If it fails.
        ClusterError: If it is missing, or does not end.
    """
    try:
        done = subprocess.run(  # noqa: S603
            command,
            env=own_environment(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            pass_fds=pass_fds,
            check=False,
        )
    except FileNotFoundError as error:
        raise ClusterError(
            f"expected the command `{command[0]}`, because the study has jobs on a SLURM cluster; "
            "found none. Run this on a login node of that cluster."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise unanswered(f"`{command[0]}` was silent for {_SECONDS:.0f} s") from error
    if done.returncode != 0:
        raise CommandFailedError(_one_line(done.stderr or done.stdout))
    return done.stdout


def own_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Leave out what would change the meaning of a command, or of the job that it submits."""
    return {
        name: value
        for name, value in environment.items()
        if name in _KEPT or not name.startswith(_FOREIGN)
    }


def unanswered(reason: object) -> ClusterError:
    """Say that the cluster could not be asked, so that nothing is known about its queue."""
    return ClusterError(
        f"expected an answer of the SLURM cluster; got: {reason}. What is in its queue is unknown, "
        "so nothing more is started. Try again when `squeue` answers; a job that was taken is "
        "found then."
    )


def max_array_size() -> int | None:
    """Return how many tasks an array may have; None if the cluster does not say."""
    try:
        config = call("scontrol", "show", "config")
    except CommandFailedError:
        return None
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
    return int(found.group(1)) if found else None


def _one_line(message: str) -> str:
    lines = (_SPEAKER.sub("", line.strip()) for line in message.splitlines())
    return "; ".join(dict.fromkeys(line for line in lines if line)) or "no message"
