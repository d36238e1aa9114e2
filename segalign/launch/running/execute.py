"""Supervise one run: start its stages, one after another, and write down how it ends."""

import contextlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from segalign.errors import ConfigError, PreemptedError
from segalign.launch.running.attempt import Attempt, begun
from segalign.launch.running.cancel_request import is_cancel_requested
from segalign.launch.running.heartbeat import DEFAULT_SECONDS, beats_on
from segalign.launch.running.recorded_config import check_recorded
from segalign.launch.running.run_claim import Claim, claim_attempt, newest_claim
from segalign.launch.running.run_folder import config_file
from segalign.launch.running.run_lock import PATIENCE, RunHeldError, held_elsewhere, run_lock
from segalign.launch.running.run_spec import check_spec
from segalign.launch.running.run_state import FINISHED, RunState, RunStatus, read_state
from segalign.launch.running.stopping import StopRequest, signal_named
from segalign.launch.slurm.requeue import requeue, slurm_job

# A large checkpoint may be on its way to a slow disk when a run is asked to stop.
_GRACE_SECONDS: Final = 180.0
# File servers keep the locks of a machine that went down for a minute or two.
_LOCK_SECONDS: Final = 180.0


def execute_run(
    run_dir: Path,
    program: Sequence[str],
    *,
    launcher: Sequence[str] = (),
    options: Sequence[str] = (),
    attempt: int | None = None,
    heartbeat_seconds: float = DEFAULT_SECONDS,
    preempting_signal: str | None = None,
    max_requeues: int = 20,
    grace_seconds: float = _GRACE_SECONDS,
    lock_seconds: float = _LOCK_SECONDS,
    stop: StopRequest | None = None,
) -> int:
    """Run the stages of a run that have not ended well yet; a finished run returns at once.

    Args:
        run_dir: The run directory, as ``sweep run`` has prepared it.
        program: Command line of ``main.py``.
        launcher: What comes before it, such as ``srun`` and its options.
        options: What comes after the stage and its config.
        attempt: Number of the attempt to make; None makes the next one, whatever its number.
        heartbeat_seconds: How often to show that this process is alive.
        preempting_signal: What a cluster sends before it takes the machine away, such as ``USR1``.
            It is handed on; a process that it ends, because it was only starting, counts as
            preempted, and its job is put back into the queue. So it is if no stage runs.
        max_requeues: How often a job may be put back.
        grace_seconds: How long a run that is asked to stop may take before it is killed.
        lock_seconds: How long a job that has been requeued waits for the lock of its old self
            before it goes back into the queue.
        stop: Whether this process was asked to stop, of a caller that makes several runs.

    Returns:
        0 if the run is done or pruned, 85 if it was preempted, 143 or 130 if this process was asked
        to stop, else the exit code of the stage that failed.

    Raises:
        ConfigError: If the directory is that of another config, the run was cancelled, or its
            program cannot be started.
        RunHeldError: If another process runs it, or has made that attempt.
        StorageError: If nothing can be written there.
    """
    run_dir = run_dir.absolute()
    spec = check_spec(run_dir)
    if _is_finished(read_state(run_dir)):
        return 0
    announced = None if preempting_signal is None else signal_named(preempting_signal)
    command = _Command(run_dir, program, launcher, options)
    is_own = _is_of_this_job(read_state(run_dir))
    own_stop = StopRequest(announced) if stop is None else contextlib.nullcontext(stop)
    with own_stop as stop:
        patience = lock_seconds if is_own else PATIENCE
        try:
            with run_lock(run_dir, patience, lambda: stop.is_told) as inherited:
                state = _claimed(run_dir, attempt, stop, is_lock_certain=bool(inherited))
                if state is None:
                    return 0
                current = Attempt(
                    run_dir=run_dir,
                    stop=stop,
                    state=state,
                    announced=announced,
                    max_requeues=max_requeues,
                    is_launched=bool(launcher),
                    waiting={
                        "inherited": inherited,
                        "beat_seconds": heartbeat_seconds,
                        "grace_seconds": grace_seconds,
                    },
                )
                current.begin(heartbeat_seconds)
                return current.go_through(spec.stages, command)
        except RunHeldError:
            if stop.signal is not None:
                return 128 + stop.signal
            if (is_own or stop.is_told) and requeue(max_requeues).requeued:
                return PreemptedError.exit_code
            raise


@dataclass(frozen=True)
class _Command:
    """How the stages of a run are started."""

    run_dir: Path
    program: Sequence[str]
    launcher: Sequence[str]
    options: Sequence[str]

    def __call__(self, stage: str) -> list[str]:
        config = config_file(self.run_dir, stage)
        if not config.is_file():
            raise ConfigError(
                f"expected the config of stage `{stage}` in `{config}`; got no file. "
                "`python main.py sweep run STUDY` writes it."
            )
        if stage == "fit":
            check_recorded(self.run_dir, config)
        return [*self.launcher, *self.program, stage, "--config", str(config), *self.options]


def _claimed(
    run_dir: Path, attempt: int | None, stop: StopRequest, *, is_lock_certain: bool
) -> RunState | None:
    """Make sure that nobody else makes the next attempt; None if the run is finished."""
    # Before the state: who has claimed an attempt since then makes the claim below fail.
    claim = newest_claim(run_dir)
    before = read_state(run_dir)
    if _is_finished(before):
        return None
    _refuse_cancelled(run_dir)
    last = 0 if before is None else before.attempt
    if attempt not in (None, last + 1):
        raise RunHeldError(
            f"expected to make attempt {attempt} of `{run_dir}`; attempt {last} "
            "has been made. Others were quicker; `python main.py sweep status STUDY` tells."
        )
    owner: Claim | RunState | None = None
    if claim is not None and claim.attempt > last:
        owner = claim  # somebody is about to write the state, or was killed before
    elif before is not None and before.status is RunStatus.RUNNING:
        owner = before
    # It may be on another machine, and some file systems keep locks on each machine alone.
    may_live = owner is not None and _may_live(owner, is_lock_certain=is_lock_certain)
    if may_live and (beats_on(run_dir, lambda: stop.is_told) or stop.is_told):
        raise held_elsewhere(run_dir)
    state = begun(before, max(last, 0 if claim is None else claim.attempt) + 1)
    claim_attempt(run_dir, Claim(attempt=state.attempt, host=state.host, job=state.job))
    return state


def _refuse_cancelled(run_dir: Path) -> None:
    if is_cancel_requested(run_dir):
        raise ConfigError(
            f"expected a run that is to run; `{run_dir}` was cancelled. "
            "Start it again with `python main.py sweep resume STUDY`."
        )


def _may_live(owner: Claim | RunState, *, is_lock_certain: bool) -> bool:
    """Say whether an attempt may go on although its lock is free here."""
    # A job that was requeued has ended where it was.
    is_here = owner.host == socket.gethostname()
    return not (_is_of_this_job(owner) or (is_here and is_lock_certain))


def _is_of_this_job(owner: Claim | RunState | None) -> bool:
    return owner is not None and owner.job is not None and owner.job == slurm_job()


def _is_finished(state: RunState | None) -> bool:
    return state is not None and state.status in FINISHED
