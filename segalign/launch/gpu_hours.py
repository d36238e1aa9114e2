"""How much of a cluster a study may take at most."""

import math
import re
from typing import Final

from segalign.launch.study import Study

_TIME: Final = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_ENDLESS: Final = ("UNLIMITED", "INFINITE")


def slurm_hours(time: str) -> float | None:
    """Read a time limit as ``sbatch`` does.

    Args:
        time: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES or
            DAYS-HOURS:MINUTES:SECONDS, or a word for no limit.

    Returns:
        Hours; None if it is no such text.
    """
    if time.upper() in _ENDLESS:
        return math.inf
    found = _TIME.fullmatch(time.strip())
    if found is None:
        return None
    days, *rest = found.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is None and len(numbers) < 3:
        numbers = [0, *numbers]
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return 24 * int(days or 0) + hours + minutes / 60 + seconds / 3600


def gpu_hours(study: Study, num_runs: int) -> float:
    """Bound the GPU-hours of some runs: each takes its whole time limit once.

    Args:
        study: The study; without a cluster it takes none.
        num_runs: How many are still to be run.
    """
    if study.slurm is None or num_runs == 0 or study.slurm.gpus_per_node == 0:
        return 0.0
    hours = slurm_hours(study.slurm.time)
    assert hours is not None, "the time limit has been read before"
    return num_runs * hours * study.slurm.nodes * study.slurm.gpus_per_node
