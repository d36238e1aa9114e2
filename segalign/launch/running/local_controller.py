"""Keep several runs going on this machine until all are finished or have failed.

The controller holds nothing that would be lost with it. Whoever starts it again sees from the run
directories what is done, waits for what still runs, and starts the rest.
"""

import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from segalign.errors import PreemptedError, SegalignError, StorageError
from segalign.launch.plan import PlannedRun, unique_runs
from segalign.launch.running.cancel_request import is_cancel_requested, withdraw_cancel
from segalign.launch.running.local_supervisor import LocalSupervisor
from segalign.launch.running.observing import ObservedRun, observe
from segalign.launch.running.run_lock import RunHeldError, run_lock
from segalign.launch.running.run_state import FINISHED, RunState, RunStatus, read_state, write_state
from segalign.launch.running.stopping import StopRequest
from segalign.run_directory import checkpoint_step, list_checkpoints

_POLL: Final = 0.2  # seconds
_MAX_IDLE_RESTARTS: Final = 3


def run_local(
    runs: Sequence[PlannedRun],
    program: Sequence[str],
    *,
    num_parallel: int,
    options: Sequence[str] = (),
    on_change: Callable[[ObservedRun], None] = lambda observed: None,
) -> None:
    """Run what is not finished, failed and cancelled runs too, and wait for all of it.

    Runs that other supervisors of this machine have in hand are waited for and count among those
    that run at the same time. What is preempted or killed is started again, unless it happens over
    and over without a new checkpoint between. What fails leaves the others alone.

    Args:
        runs: The runs, in the order in which they are started.
        program: Command line of ``main.py``.
        num_parallel: Runs at the same time.
        options: More arguments of every run.
        on_change: Called whenever the status of a run has changed.

    Raises:
        PreemptedError: If this process is asked to stop by SIGINT or SIGTERM; the runs that it has
            started are stopped first, and can go on later.
    """
    with StopRequest() as stop:
        _Controller(runs, program, num_parallel, options, on_change).work(stop)


@dataclass
class _Restarts:
    """How often a run was started again since its last progress."""

    progress: tuple[int, int]
    num: int = 0


class _Controller:
    """Which runs wait, which run as children of this process, and which others have in hand."""

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        program: Sequence[str],
        num_parallel: int,
        options: Sequence[str],
        on_change: Callable[[ObservedRun], None],
    ) -> None:
        self.program, self.num_parallel, self.options = program, num_parallel, options
        self.on_change = on_change
        self.waiting: deque[PlannedRun] = deque()
        self.own: dict[str, LocalSupervisor] = {}
        self.others: dict[str, ObservedRun] = {}
        self.shown: dict[str, RunStatus] = {}
        # Attempts that had ended before, so that an old failure is told from a new one.
        self.attempts: dict[str, int] = {}
        self.restarts: dict[str, _Restarts] = {}
        self.lost: list[str] = []
        for observed in observe(unique_runs(runs)):
            self._take_up(observed)

    def work(self, stop: StopRequest) -> None:
        """Do everything."""
        while self.waiting or self.own or self.others:
            if stop.signal is not None:
                self._stop(stop)
            self._look_at_own()
            self._look_at_others()
            self._fill()
            time.sleep(_POLL)
        if self.lost:
            raise StorageError(
                f"expected to write down how runs ended; {len(self.lost)} failed and could not, "
                f"the first {self.lost[0]}"
            )

    def _take_up(self, observed: ObservedRun) -> None:
        run = observed.run
        self.shown[run.run_id] = observed.status
        self.attempts[run.run_id] = _ended_attempts(observed)
        if observed.status is RunStatus.RUNNING:
            self.others[run.run_id] = observed
        elif observed.status not in FINISHED:
            self._allow(observed)

    def _allow(self, observed: ObservedRun) -> None:
        """Let a run wait for its turn, even if it was cancelled before."""
        try:
            withdraw_cancel(observed.run.directory)
        except StorageError as error:
            self._fail(observed, error.exit_code, str(error))
        else:
            self.waiting.append(observed.run)

    def _look_at_own(self) -> None:
        # Ended or not is seen first: what has ended has written its last state.
        codes = {name: one.process.poll() for name, one in self.own.items()}
        for observed in observe([one.run for one in self.own.values()]):
            name = observed.run.run_id
            code = codes[name]
            if code is None:
                self._show(observed, only=RunStatus.RUNNING)
            else:
                self._settle(observed, self.own.pop(name), code)

    def _look_at_others(self) -> None:
        for observed in observe([one.run for one in self.others.values()]):
            name = observed.run.run_id
            self._show(observed)
            if observed.status is RunStatus.RUNNING:
                self.others[name] = observed
                continue
            del self.others[name]
            if not self._has_ended(observed):
                self._restart(observed)

    def _fill(self) -> None:
        while self.waiting and self._num_running() < self.num_parallel:
            run = self.waiting.popleft()
            observed = observe([run])[0]
            if observed.status is RunStatus.RUNNING:
                self._show(observed)
                self.others[run.run_id] = observed
            elif self._has_ended(observed):
                self._show(observed)
            else:
                self._start(observed)

    def _start(self, observed: ObservedRun) -> None:
        run = observed.run
        self.attempts[run.run_id] = _ended_attempts(observed)
        # It makes the attempt after what is seen here, or none: another may be quicker.
        attempt = 1 if observed.state is None else observed.state.attempt + 1
        try:
            self.own[run.run_id] = LocalSupervisor.start(run, self.program, attempt, self.options)
        except SegalignError as error:
            self._fail(observed, error.exit_code, str(error))

    def _settle(self, observed: ObservedRun, supervisor: LocalSupervisor, code: int) -> None:
        """Decide what follows the end of an own supervisor."""
        if observed.status is RunStatus.RUNNING:  # others were quicker, or its child outlives it
            self._show(observed)
            self.others[observed.run.run_id] = observed
        elif self._has_ended(observed):
            self._show(observed)
        elif code == RunHeldError.exit_code:
            self.waiting.append(observed.run)
        elif code < 0 or (self._is_new(observed) and code != StorageError.exit_code):
            self._show(observed)
            self._restart(observed)
        else:
            self._fail(observed, code, supervisor.reason(code))

    def _restart(self, observed: ObservedRun) -> None:
        run = observed.run
        progress = _progress(observed)
        restarts = self.restarts.setdefault(run.run_id, _Restarts(progress))
        if progress > restarts.progress:
            restarts.progress, restarts.num = progress, 0
        restarts.num += 1
        if restarts.num > _MAX_IDLE_RESTARTS:
            times = f"stopped {restarts.num} times without a new checkpoint"
            self._fail(observed, PreemptedError.exit_code, f"{times}; not started again")
        else:
            self.waiting.appendleft(run)

    def _has_ended(self, observed: ObservedRun) -> bool:
        """Say whether a run needs no more, or has failed or been cancelled since it waits."""
        if observed.status in FINISHED or is_cancel_requested(observed.run.directory):
            return True
        return observed.status is RunStatus.FAILED and self._is_new(observed)

    def _is_new(self, observed: ObservedRun) -> bool:
        return _ended_attempts(observed) > self.attempts[observed.run.run_id]

    def _num_running(self) -> int:
        here = socket.gethostname()
        states = [one.state for one in self.others.values()]
        return len(self.own) + sum(state is None or state.host == here for state in states)

    def _show(self, observed: ObservedRun, only: RunStatus | None = None) -> None:
        name, status = observed.run.run_id, observed.status
        if status is not self.shown[name] and only in (None, status):
            self.shown[name] = status
            self.on_change(observed)

    def _fail(self, observed: ObservedRun, code: int, reason: str) -> None:
        """Show and write down a failure that its supervisor did not."""
        line = " ".join(reason.split())
        state = replace(
            observed.state or RunState(status=RunStatus.FAILED),
            status=RunStatus.FAILED,
            exit_code=code,
            reason=line,
        )
        if not _write_down(observed, state):
            self.lost.append(f"`{observed.run.label}`, seed {observed.run.seed}: {line}")
        self.shown[observed.run.run_id] = RunStatus.FAILED
        self.on_change(
            replace(
                observed,
                status=RunStatus.FAILED,
                state=state,
                beat_age=None,
                progress_age=None,
            )
        )

    def _stop(self, stop: StopRequest) -> None:
        """Stop the runs that this process has started; at a second signal, kill them."""
        num_stopped, num_told = len(self.own), 0
        while self.own:
            if stop.num_asked > num_told:
                for one in self.own.values():
                    one.stop() if num_told == 0 else one.kill()
                num_told = stop.num_asked
            self._look_at_ending()
            time.sleep(_POLL)
        others = f"; {len(self.others)} of another command go on" if self.others else ""
        raise PreemptedError(
            f"{num_stopped} runs were stopped and {len(self.waiting)} wait{others}. "
            "The same command goes on with all of them."
        )

    def _look_at_ending(self) -> None:
        ended = [name for name, one in self.own.items() if one.process.poll() is not None]
        for observed in observe([self.own.pop(name).run for name in ended]):
            self._show(observed)


def _ended_attempts(observed: ObservedRun) -> int:
    """Return the number of a run's last attempt that has ended."""
    if observed.state is None:
        return 0
    is_current = observed.state.status is RunStatus.RUNNING
    is_running = is_current and observed.status is RunStatus.RUNNING
    return observed.state.attempt - is_running


def _progress(observed: ObservedRun) -> tuple[int, int]:
    """Measure what a run would not have to repeat: stages, then steps of its last checkpoint."""
    stages = () if observed.state is None else observed.state.stages_done
    checkpoints = list_checkpoints(observed.run.directory)
    return len(stages), checkpoint_step(checkpoints[-1]) if checkpoints else -1


def _write_down(observed: ObservedRun, state: RunState) -> bool:
    """Write the state of a run that nobody runs, if it still has the one that was seen."""
    directory = observed.run.directory
    try:
        with run_lock(directory):
            if read_state(directory) == observed.state:
                write_state(directory, state)
    except SegalignError:
        return False
    return True
