"""One round of a search: tell what has ended, ask for more, and plan it. It keeps no state.

Killed at any moment, the next round goes on: what was asked for but is in no plan is proposed
again, and what is in the plan is started by whoever starts what has not been.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from segalign.errors import ConfigError
from segalign.launch.plan import Plan, PlannedRun, ResolveConfig
from segalign.launch.planning import PlannedStudy, digest_study, plan_study
from segalign.launch.points import RunPoint
from segalign.launch.running.observing import ObservedRun, observe
from segalign.launch.running.run_state import FINISHED, RunStatus
from segalign.launch.searching.search import OptunaSearch
from segalign.launch.searching.trial_storage import reachable, trial_storage, write_trial
from segalign.launch.study import Study

_ENDED: Final = (*FINISHED, RunStatus.FAILED)
_MAX_REFUSED: Final = 10
_logger = logging.getLogger(__name__)


def search_round(
    study: Study,
    resolve: ResolveConfig,
    plan: Plan | None,
    observed: Sequence[ObservedRun],
    max_open: int,
) -> tuple[PlannedStudy, list[PlannedRun]]:
    """Tell the searcher what has ended, and let it propose runs in the place of those.

    A point that is the same as an earlier one is the same run: its value is told at once, and
    another is proposed. A point whose config does not fit is left out with a warning, unless no
    config has fitted yet.

    Args:
        study: The study; its ``search`` is set.
        resolve: The parser of runs.
        plan: All trials so far; None at the beginning.
        observed: How far its runs are.
        max_open: Runs to have at a time, those that have not ended included.

    Returns:
        All trials so far, with the configs of the new runs alone; and the new runs. The caller
        prepares and keeps them before it starts them. No new run while none is open is the end.

    Raises:
        ConfigError: If the study cannot be searched, or its configs do not fit.
        DataError: If the trials of the plan are gone.
        StorageError: If the searcher's storage cannot be used.
    """
    with reachable(trial_storage(study)):
        going = _Round(study, resolve, plan)
        going.search.tell(observed)
        num_open = sum(one.status not in _ENDED for one in observed)
        while num_open + len(going.new) < max_open and going.search.remaining():
            going.step()
    return going.planned(), going.new


class _Round:
    def __init__(self, study: Study, resolve: ResolveConfig, plan: Plan | None) -> None:
        self.study = study
        self.resolve = resolve
        self.search = OptunaSearch(study, plan)
        self.runs: list[PlannedRun] = [] if plan is None else [*plan.runs]
        self.new: list[PlannedRun] = []
        self._parts: list[PlannedStudy] = []
        self._refused: list[tuple[RunPoint, ConfigError]] = []
        self._num_refused = 0  # in a row

    def step(self) -> None:
        """Ask for one more point, and plan it."""
        (point,) = self.search.ask(1)
        try:
            part = plan_study(self.study, self.resolve, [point])
        except ConfigError as error:
            self._refuse(point, error)
            return
        self._num_refused = 0
        self._take(part)
        self._leave_out_refused()

    def planned(self) -> PlannedStudy:
        """Return all trials so far, with the configs of the new runs."""
        configs = {run_id: own for part in self._parts for run_id, own in part.configs.items()}
        plan = Plan(
            study=self.study.name,
            base_label=_base_label(self.study, self.runs),
            runs=self.runs,
            digest=digest_study(self.study),
        )
        if not self._parts:
            finished: frozenset[str] = frozenset()
            return PlannedStudy(
                study=self.study, plan=plan, configs=configs, finished=finished, gpu_hours=0.0
            )
        return replace(self._parts[-1], plan=plan, configs=configs)

    def _take(self, part: PlannedStudy) -> None:
        (run,) = part.plan.runs
        is_known = run.run_id in {one.run_id for one in self.runs}
        self.search.take(run)
        self.runs.append(run)
        (now,) = observe([run])
        if now.status in _ENDED:
            self.search.tell([now])
        elif not is_known:
            self._parts.append(part)
            self.new.append(run)
            if self.search.settings.prune and run.trial is not None:
                write_trial(run.directory, self.search.record(run.trial))

    def _refuse(self, point: RunPoint, error: ConfigError) -> None:
        """Keep a point whose config does not fit, until it is known that others do."""
        self._refused.append((point, error))
        self._num_refused += 1
        if self._num_refused >= _MAX_REFUSED or (not self.runs and not self.search.remaining()):
            raise error
        if self.runs:
            self._leave_out_refused()

    def _leave_out_refused(self) -> None:
        for point, error in self._refused:
            assert point.trial is not None
            _logger.warning("`%s` is left out: %s", point.label, error)
            self.search.leave_out(point.trial, str(error))
        self._refused.clear()


def _base_label(study: Study, runs: Sequence[PlannedRun]) -> str:
    """Name the trial that others are compared with: the first of the base arm, or of all."""
    of_base = (run for run in runs if run.label.partition(": ")[2] == study.base_arm)
    first = next(of_base, runs[0] if runs else None)
    return "" if first is None else first.label
