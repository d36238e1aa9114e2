"""Supervise one run: start its stages, one after another, and write down how it ends."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import psutil

from segalign.errors import ConfigError, PreemptedError, PrunedError, SegalignError, StorageError
from segalign.launch.running.cancel_request import is_cancel_requested
from segalign.launch.running.failure_reason import failure_reason
from segalign.launch.running.heartbeat import DEFAULT_SECONDS, beat, beats_on, start_heartbeat
from segalign.launch.running.run_folder import attempt_log, config_file
from segalign.launch.running.run_lock import RunHeldError, held_elsewhere, run_lock
from segalign.launch.running.run_spec import check_spec
from segalign.launch.running.run_state import FINISHED, RunState, RunStatus, read_state, write_state
from segalign.launch.running.stage_process import run_stage
from segalign.launch.running.stopping import StopRequest
from segalign.launch.slurm.requeue import requeue, slurm_job

# A large checkpoint may be on its way to a slow disk when a run is asked to stop.
_GRACE_SECONDS: Final = 180.0


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
            preempted, and its job is put back into the queue.
        max_requeues: How often a job may be put back.
        grace_seconds: How long a run that is asked to stop may take before it is killed.

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
    announced = None if preempting_signal is None else _signal_named(preempting_signal)
    command = _Command(run_dir, program, launcher, options)
    with run_lock(run_dir) as inherited, StopRequest(announced) as stop:
        before = read_state(run_dir)
        if _is_finished(before):
            return 0
        _refuse_unstartable(run_dir, before, is_lock_certain=bool(inherited))
        state = _begun(before)
        if attempt not in (None, state.attempt):
            raise RunHeldError(
                f"expected to make attempt {attempt} of `{run_dir}`; attempt {state.attempt - 1} "
                "has been made. Others were quicker; `python main.py sweep status STUDY` tells."
            )
        current = _Attempt(
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
        return [*self.launcher, *self.program, stage, "--config", str(config), *self.options]


@dataclass(kw_only=True)
class _Attempt:
    """One attempt at a run, from its first state to its last."""

    run_dir: Path
    stop: StopRequest
    state: RunState
    announced: signal.Signals | None
    max_requeues: int
    is_launched: bool
    waiting: Mapping[str, Any]
    began: float = field(default_factory=time.monotonic)

    def begin(self, heartbeat_seconds: float) -> None:
        """Say that it runs; the beat first, so that nobody takes it for dead."""
        start_heartbeat(self.run_dir, heartbeat_seconds)
        write_state(self.run_dir, self.state)

    def go_through(self, stages: Sequence[str], command: Callable[[str], Sequence[str]]) -> int:
        """Run the stages that are not done yet; return the exit code of the supervisor."""
        try:
            for stage in stages:
                if stage in self.state.stages_done:
                    continue
                code, reason = self._run(command(stage))
                if code != 0:
                    return self._end_badly(code, reason)
                self._note(stages_done=(*self.state.stages_done, stage))
            return self._end(RunStatus.DONE, 0)
        except SegalignError as error:
            # The disk may be full; then it is seen from outside that nobody runs this run.
            with contextlib.suppress(StorageError):
                self._end(RunStatus.FAILED, error.exit_code, " ".join(str(error).split()))
            raise

    def _run(self, command: Sequence[str]) -> tuple[int, str]:
        """Run a stage; return its exit code, and why it failed if it did."""
        if self.stop.signal is not None:
            return -self.stop.signal, ""
        log = attempt_log(self.run_dir, self.state.attempt)
        start = log.stat().st_size if log.exists() else 0
        code = run_stage(command, log, stop=self.stop, beat=self._beat, **self.waiting)
        if code == 0 and self.is_launched and self.stop.num_asked > 0:
            # An srun that is ended before its processes says 0. If they were done, the next
            # attempt finds that there is nothing left to do.
            code = -signal.SIGTERM
        return code, "" if code == 0 else failure_reason(log, code, start)

    def _beat(self) -> None:
        beat(self.run_dir)
        if is_cancel_requested(self.run_dir):
            self.stop.ask()

    def _end_badly(self, code: int, reason: str) -> int:
        """Tell a run that was stopped from one that failed."""
        asked = self.stop.signal
        if asked is not None and is_cancel_requested(self.run_dir):
            return self._end(RunStatus.CANCELLED, 128 + asked)
        if code == PreemptedError.exit_code:
            return self._end(RunStatus.PREEMPTED, code, reason)
        if code == PrunedError.exit_code:
            self._end(RunStatus.PRUNED, code, reason)
            return 0
        if asked is not None:
            return self._end(RunStatus.PREEMPTED, 128 + asked)
        if self.announced is not None and code in (-self.announced, 128 + self.announced):
            return self._put_back()
        return self._end(RunStatus.FAILED, code, reason)

    def _put_back(self) -> int:
        """Requeue for a child that the signal ended before it could answer."""
        code = PreemptedError.exit_code
        reason = "ended by the announcing signal while it was starting"
        # The state first: SLURM ends this process as soon as it is asked.
        self._end(RunStatus.PREEMPTED, code, reason)
        if not is_cancel_requested(self.run_dir):
            outcome = requeue(self.max_requeues)
            self._note(reason=f"{reason}; {outcome}")
        return code

    def _end(self, status: RunStatus, code: int, reason: str = "") -> int:
        seconds = self.state.seconds + time.monotonic() - self.began
        self._note(status=status, exit_code=code, reason=reason, ended=_now(), seconds=seconds)
        return code if code >= 0 else 128 - code

    def _note(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)
        write_state(self.run_dir, self.state)


def _begun(before: RunState | None) -> RunState:
    """Describe the attempt that starts now."""
    return RunState(
        status=RunStatus.RUNNING,
        attempt=1 if before is None else before.attempt + 1,
        stages_done=() if before is None else before.stages_done,
        started=_now(),
        seconds=0.0 if before is None else before.seconds,
        host=socket.gethostname(),
        pid=os.getpid(),
        pid_created=psutil.Process().create_time(),
        job=slurm_job(os.environ),
    )


def _refuse_unstartable(run_dir: Path, before: RunState | None, *, is_lock_certain: bool) -> None:
    """Refuse a run that was cancelled, or that another machine may run."""
    if is_cancel_requested(run_dir):
        raise ConfigError(
            f"expected a run that is to run; `{run_dir}` was cancelled. "
            "Start it again with `python main.py sweep resume STUDY`."
        )
    if before is None or before.status is not RunStatus.RUNNING:
        return
    # Some file systems keep locks on each machine alone. A job that was requeued has ended there.
    is_same_job = before.job is not None and before.job == slurm_job(os.environ)
    is_here = before.host == socket.gethostname()
    if not (is_same_job or (is_here and is_lock_certain)) and beats_on(run_dir):
        raise held_elsewhere(run_dir)


def _is_finished(state: RunState | None) -> bool:
    return state is not None and state.status in FINISHED


def _signal_named(name: str) -> signal.Signals:
    try:
        return signal.Signals[f"SIG{name.removeprefix('SIG')}"]
    except KeyError as error:
        raise ConfigError(
            f"expected the name of a signal, such as `USR1`; got `{name}`. "
            "Mend `slurm.signal` of the study."
        ) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
