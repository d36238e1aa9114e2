"""A searcher that proposes runs of a study, one after another, from what earlier ones have found.

All that it knows is in its storage: it can be killed at any moment and opened anew.
"""

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from segalign.errors import ConfigError, DataError
from segalign.launch.findings.run_metrics import read_metric
from segalign.launch.plan import Plan, PlannedRun
from segalign.launch.points import RunPoint
from segalign.launch.running.observing import ObservedRun
from segalign.launch.running.run_state import RunStatus
from segalign.launch.searching.search_space import SearchSpace
from segalign.launch.searching.trial_storage import (
    TrialRecord,
    import_optuna,
    open_trials,
    trial_storage,
)
from segalign.launch.study import MetricSpec, SearchSettings, Study

if TYPE_CHECKING:
    import optuna

_DEFINITION: Final = "segalign"  # attribute of a search: what it is over
_LEFT_OUT: Final = "left_out"  # attribute of a trial that became no run: why
_RETRY_OF: Final = "retry_of"  # attribute of a trial: number of a failed one that went well later
_MAX_EXCLUDED: Final = 200
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Verdict:
    state: str
    value: float | None = None


class OptunaSearch:
    """Proposes points of a study's space, after Optuna's TPE sampler.

    Its draws depend on the seed, on a trial's number and on what has been told before alone, so
    that runs made one after another are proposed alike again.

    Args:
        study: The study.
        plan: Its runs so far, if there are any.

    Raises:
        ConfigError: If the study has no metric, nothing to search, or another space than before,
            or Optuna is missing.
        DataError: If the trials of the plan are not in the storage.
        StorageError: If the storage cannot be used.
    """

    def __init__(self, study: Study, plan: Plan | None = None) -> None:
        self._optuna = import_optuna()
        self.settings = study.search or SearchSettings()
        self.metric = _first_metric(study)
        self.space = SearchSpace(study)
        self.name = study.name
        self.storage = trial_storage(study)
        self._study = open_trials(self.storage, study.name, self.metric.mode)
        self._check_definition(study)
        runs = () if plan is None else plan.runs
        self._planned: dict[int, PlannedRun | None] = {
            run.trial: run for run in runs if run.trial is not None
        }
        self._check_planned(study)

    def remaining(self) -> int:
        """Return how many more points may be asked for."""
        return max(0, self.settings.trials - len(self._planned))

    def ask(self, count: int) -> list[RunPoint]:
        """Propose up to so many points, fewer at the end of the search.

        Points that were proposed before but are in no plan, because a controller was killed, come
        first.

        Raises:
            ConfigError: If ``exclude`` leaves out all that is proposed.
        """
        points = []
        for _ in range(min(count, self.remaining())):
            trial = self._unplanned() or self._propose()
            self._planned[trial.number] = None
            points.append(self.space.point(trial.number, trial.params))
        return points

    def take(self, run: PlannedRun) -> None:
        """Learn which run a point has become, so that what becomes of the run can be told."""
        if run.trial is not None:
            self._planned[run.trial] = run

    def leave_out(self, number: int, reason: str) -> None:
        """Learn that a point becomes no run; it does not count."""
        self._planned.pop(number, None)
        trial = self._trials()[number]
        live = self._optuna.trial.Trial(self._study, trial._trial_id)
        live.set_user_attr(_LEFT_OUT, reason)
        self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)

    def tell(self, observed: Sequence[ObservedRun]) -> None:
        """Tell the searcher what has become of runs; each trial is told once.

        Trials that share a run, because they are the same point, share its value.
        """
        by_id = {one.run.run_id: one for one in observed}
        trials = self._trials()
        retried = {trial.user_attrs.get(_RETRY_OF) for trial in trials}
        for number, run in self._planned.items():
            one = None if run is None else by_id.get(run.run_id)
            if one is None or number in retried:
                continue
            trial = trials[number]
            if not trial.state.is_finished():
                self._tell(trial, self._judge(one, says_why=True))
            elif trial.state.name == "FAIL" and one.status is RunStatus.DONE:
                self._tell_retry(trial, self._judge(one, says_why=False))

    def best(self) -> tuple[str, float] | None:
        """Return label and value of the best trial so far; None if none is done."""
        done = [
            trial
            for trial in self._trials()
            if trial.state.name == "COMPLETE" and self.space.is_whole(trial.params)
        ]
        if not done:
            return None
        sign = 1 if self.metric.mode == "max" else -1
        best = max(done, key=lambda trial: sign * trial.values[0])
        number = best.user_attrs.get(_RETRY_OF, best.number)
        return self.space.point(number, best.params).label, best.values[0]

    def record(self, number: int) -> TrialRecord:
        """Return what the run of a trial must know to be pruned."""
        return TrialRecord(storage=self.storage, study=self.name, number=number)

    def _propose(self) -> "optuna.trial.FrozenTrial":
        for _ in range(_MAX_EXCLUDED):
            seed = _seed_of(self.settings.seed, len(self._trials()))
            self._study.sampler = self._optuna.samplers.TPESampler(seed=seed)
            asked = self._study.ask(self.space.distributions())
            trial = self._trials()[asked.number]
            if not self.space.is_excluded(trial.params):
                return trial
            self.leave_out(asked.number, "excluded")
        raise ConfigError(
            f"expected points that `exclude` does not leave out; got none in {_MAX_EXCLUDED} "
            "proposals. Leave out less, or narrow the ranges instead."
        )

    def _unplanned(self) -> "optuna.trial.FrozenTrial | None":
        for trial in self._trials():
            has_no_run = trial.user_attrs.keys() & {_LEFT_OUT, _RETRY_OF}
            if has_no_run or trial.number in self._planned:
                continue
            if self.space.is_whole(trial.params):
                return trial
            if not trial.state.is_finished():
                self.leave_out(trial.number, "incomplete: the searcher was stopped")
        return None

    def _judge(self, one: ObservedRun, *, says_why: bool) -> _Verdict | None:
        if one.status is RunStatus.PRUNED:
            return _Verdict("PRUNED")
        if one.status is RunStatus.FAILED:
            return _Verdict("FAIL")
        if one.status is not RunStatus.DONE:
            return None
        try:
            value = read_metric(one.run.directory, self.metric)
            why = "the run has none" if value is None else f"got {value}"
        except DataError as error:
            value, why = None, str(error)
        if value is not None and math.isfinite(value):
            return _Verdict("COMPLETE", value)
        if says_why:
            _logger.warning(
                "%s counts as failed for the searcher: expected a finite `%s`; %s",
                *(one.run.label, self.metric.name, why),
            )
        return _Verdict("FAIL")

    def _tell(self, trial: "optuna.trial.FrozenTrial", verdict: _Verdict | None) -> None:
        if verdict is not None:
            state = self._optuna.trial.TrialState[verdict.state]
            self._study.tell(trial.number, verdict.value, state=state)

    def _tell_retry(self, failed: "optuna.trial.FrozenTrial", verdict: _Verdict | None) -> None:
        """Add a trial for one that failed and has gone well since: what is told stays told."""
        if verdict is not None and verdict.value is not None:
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    params=failed.params,
                    distributions=failed.distributions,
                    value=verdict.value,
                    user_attrs={_RETRY_OF: failed.number},
                )
            )

    def _trials(self) -> "list[optuna.trial.FrozenTrial]":
        found: list[optuna.trial.FrozenTrial] = self._study.get_trials(deepcopy=False)
        return found

    def _check_definition(self, study: Study) -> None:
        wanted: dict[str, Any] = {"metric": self.metric.name, "mode": self.metric.mode}
        wanted |= {"space": self.space.describe()}
        known = self._study.user_attrs.get(_DEFINITION)
        if known is None:
            self._study.set_user_attr(_DEFINITION, wanted)
        elif known != wanted:
            raise ConfigError(
                f"expected the arms, axes, ranges and first metric that the search `{study.name}` "
                "was begun with; they have changed since. Undo it, or give the study another "
                "`name` and `folder`; finished runs are not repeated."
            )

    def _check_planned(self, study: Study) -> None:
        lost = [number for number in self._planned if number >= len(self._trials())]
        if lost:
            raise DataError(
                f"expected trial {min(lost)} of the plan in `{study.folder}` among those that the "
                f"searcher keeps; it has {len(self._trials())}. Bring its storage back, or move "
                "the plan away to begin anew; finished runs are not repeated."
            )


def _first_metric(study: Study) -> MetricSpec:
    if not study.metrics:
        raise ConfigError(
            "expected a metric for the searcher; got a study without `metrics`. Name it first "
            "among them, such as `val/attributes`."
        )
    metric = study.metrics[0]
    if study.search is not None and study.search.prune and not metric.name.startswith("val/"):
        raise ConfigError(
            "expected a metric of validation, `val/...`, as the first of `metrics` for "
            f"`search.prune`; got `{metric.name}`. Put one first, or prune nothing."
        )
    return metric


def _seed_of(seed: int, number: int) -> int:
    """Mix a seed with a trial's number, so that a searcher opened anew does not repeat itself."""
    digest = hashlib.sha256(f"segalign search {seed} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
