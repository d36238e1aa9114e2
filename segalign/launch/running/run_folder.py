"""What a study keeps in a run directory, besides what the run itself writes there.

::

    RUN/sweep/spec.json          id and stages: which configs this directory belongs to
    RUN/sweep/fit.yaml           resolved config of a stage, with this directory in it
    RUN/sweep/test.yaml
    RUN/sweep/state.json         how far it is, see segalign.launch.running.run_state
    RUN/sweep/heartbeat          its time of change says when its supervisor was last alive
    RUN/sweep/lock               held by whoever runs it, and by the processes that it starts
    RUN/sweep/cancel             while it is there, nobody runs it
    RUN/sweep/attempt-1.log      what an attempt printed
    RUN/sweep/attempt-1.claim    who makes or made that attempt: host and job
    RUN/sweep/supervisor.log     what supervisors printed that were started on this machine

Pure standard library.
"""

from pathlib import Path
from typing import Final

SPEC_FILE: Final = "spec.json"
STATE_FILE: Final = "state.json"
HEARTBEAT_FILE: Final = "heartbeat"
LOCK_FILE: Final = "lock"
CANCEL_FILE: Final = "cancel"
SUPERVISOR_LOG: Final = "supervisor.log"


def sweep_folder(run_dir: Path) -> Path:
    """Name the folder of a run directory that studies write."""
    return run_dir / "sweep"


def config_file(run_dir: Path, stage: str) -> Path:
    """Name the file with the resolved config of a stage."""
    return sweep_folder(run_dir) / f"{stage}.yaml"


def attempt_log(run_dir: Path, attempt: int) -> Path:
    """Name the file with what an attempt printed; attempts count from 1."""
    return sweep_folder(run_dir) / f"attempt-{attempt}.log"
