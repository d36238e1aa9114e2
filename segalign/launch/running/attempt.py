"""One attempt at a run: its stages, one after another, and how they end."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from segalign.errors import PreemptedError, PrunedError, SegalignError, StorageError
from segalign.launch.running.cancel_request import is_cancel_requested
from segalign.launch.running.failure_reason import failure_reason, unmasked_code
from segalign.launch.running.heartbeat import beat, start_heartbeat
from segalign.launch.running.run_folder import attempt_log
from segalign.launch.running.run_state import RunState, RunStatus, write_state
from segalign.launch.running.stage_process import run_stage
from segalign.launch.running.stopping import StopRequest
from segalign.launch.slurm.requeue import requeue, slurm_job


def begun(before: RunState | None, attempt: int) -> RunState:
    """Describe the attempt that starts now."""
    return RunState(
        status=RunStatus.RUNNING,
        attempt=attempt,
        stages_done=() if before is None else before.stages_done,
        started=_now(),
        seconds=0.0 if before is None else before.seconds,
        host=socket.gethostname(),
        pid=os.getpid(),
        pid_created=psutil.Process().create_time(),
        job=slurm_job(),
    )


@dataclass(kw_only=True)
class Attempt:
    """One attempt at a run, from its first state to its last."""

    run_dir: Path
    stop: StopRequest
    state: RunState
    announced: signal.Signals | None
    max_requeues: int
    is_launched: bool
    waiting: Mapping[str, Any]
    is_cancelled: bool = False
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
                # A stage that was over when the signal came did not answer it.
                if self.stop.is_announced and self.stop.signal is None:
                    return self._put_back(f"the announcing signal came before stage {stage}")
                code, reason = self._run(command(stage))
                if code != 0:
                    return self._end_badly(stage, code, reason)
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
        code = run_stage(
            command,
            log,
            take_forwarded=self.stop.take_forwarded,
            parting=self._parting,
            beat=self._beat,
            **self.waiting,
        )
        if self.is_launched:
            code = unmasked_code(log, code, start)
        if code == 0 and self._asked is not None:
            # What is ended before its time may say 0, as srun does. If it was done, the next
            # attempt finds that there is nothing left to do.
            code = -signal.SIGTERM
        return code, "" if code == 0 else failure_reason(log, code, start)

    def _beat(self) -> None:
        beat(self.run_dir)
        self.is_cancelled = self.is_cancelled or is_cancel_requested(self.run_dir)

    @property
    def _asked(self) -> signal.Signals | None:
        """What ends this attempt from outside."""
        return self.stop.signal or (signal.SIGTERM if self.is_cancelled else None)

    def _parting(self) -> Sequence[signal.Signals]:
        """Name the signals that are to end a stage, one after another; none as long as it runs."""
        if self._asked is None:
            return ()
        # At SIGTERM a launcher kills its processes, and does not let them save. What is cancelled
        # is not to save and to go on.
        is_saved = self.is_launched and not is_cancel_requested(self.run_dir)
        if self.announced is not None and is_saved:
            return (self.announced, signal.SIGTERM)
        return (signal.SIGTERM,)

    def _end_badly(self, stage: str, code: int, reason: str) -> int:
        """Tell a run that was stopped from one that failed."""
        asked = self._asked
        if asked is not None and is_cancel_requested(self.run_dir):
            return self._end(RunStatus.CANCELLED, 128 + asked)
        if code == PreemptedError.exit_code:
            return self._end(RunStatus.PREEMPTED, code, reason)
        if code == PrunedError.exit_code:
            self._end(RunStatus.PRUNED, code, reason)
            return 0
        if asked is not None:
            return self._end(RunStatus.PREEMPTED, 128 + asked)
        ended_by = next((one for one in self._preempting() if code in (-one, 128 + one)), None)
        if ended_by is not None:
            return self._put_back(f"ended by {ended_by.name} in stage {stage}")
        return self._end(RunStatus.FAILED, code, reason)

    def _preempting(self) -> set[signal.Signals]:
        """List the signals with which a cluster takes a machine away."""
        announced = set() if self.announced is None else {self.announced}
        # A partition with preemption sends SIGTERM to all processes, whatever a job has asked for.
        return announced | ({signal.SIGTERM} if self.is_launched and slurm_job() else set())

    def _put_back(self, reason: str) -> int:
        """Requeue for a child that could not answer, or was not started."""
        code = PreemptedError.exit_code
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
