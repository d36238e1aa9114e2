"""The space that a searcher goes through: the arms and axes of a study."""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from segalign.errors import ConfigError
from segalign.launch.points import RunPoint, expand, layer_settings, run_label
from segalign.launch.searching.trial_storage import import_optuna
from segalign.launch.study import Axis, Level, Study

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_ARM: Final = "arm"
_MORE_CALLBACKS: Final = "trainer.callbacks+"


class SearchSpace:
    """Arms and levels, chosen by their names, and numbers within ranges.

    Args:
        study: The study.

    Raises:
        ConfigError: If there is nothing to choose.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._arms = {arm.name: arm for arm in study.arms}
        if len(self._arms) == 1 and not study.axes:
            raise ConfigError(
                "expected something to search; got one arm and no `grid`. Add arms, or a key with "
                "values or with `{low: ..., high: ...}` under `grid`."
            )

    def distributions(self) -> "dict[str, BaseDistribution]":
        """Return what Optuna draws from, by the names of its parameters."""
        optuna = import_optuna()
        of_axes = {axis.label: _distribution(axis) for axis in self._study.axes}
        if len(self._arms) == 1:
            return of_axes
        arms = optuna.distributions.CategoricalDistribution(list(self._arms))
        return {_ARM: arms, **of_axes}

    def describe(self) -> dict[str, Any]:
        """Say what the space is, in plain data."""
        to_json = import_optuna().distributions.distribution_to_json
        return {name: json.loads(to_json(one)) for name, one in self.distributions().items()}

    def is_whole(self, params: Mapping[str, Any]) -> bool:
        """Tell whether all has been drawn."""
        return params.keys() == self.distributions().keys()

    def is_excluded(self, params: Mapping[str, Any]) -> bool:
        """Tell whether the study leaves out what has been drawn.

        Of a range, ``exclude`` can name its ends alone; what is between them is never left out.
        """
        arm = self._arms[params.get(_ARM, self._study.arms[0].name)]
        labels = {label: level.label for label, level in self._levels(params).items()}
        return self._listed(arm.name, labels) not in self._allowed

    def point(self, number: int, params: Mapping[str, Any]) -> RunPoint:
        """Make the run of a trial, with the study's first seed.

        Args:
            number: Of the trial.
            params: What has been drawn.
        """
        study = self._study
        arm = self._arms[params.get(_ARM, study.arms[0].name)]
        levels = self._levels(params)
        labels = {label: level.label for label, level in levels.items()}
        varied = [level.settings for level in levels.values()]
        variant = run_label(arm, labels, is_only_arm=len(study.arms) == 1)
        return RunPoint(
            label=f"trial {number}: {variant}",
            arm=arm.name,
            levels=labels,
            seed=study.seeds[0],
            configs=(*study.base, *arm.configs),
            settings=self._with_pruning(layer_settings(study.settings, arm.settings, *varied)),
            trial=number,
        )

    def _with_pruning(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Add the callback that stops runs, alike for all trials and wherever the study is.

        Which trial a run is lies in its directory: in its config, it would make each trial another
        run, be it the same point.
        """
        study = self._study
        if study.search is None or not study.search.prune:
            return dict(settings)
        callback = {
            "class_path": "callbacks.optuna_pruning.OptunaPruning",
            "init_args": {"search": study.name, "monitor": study.metrics[0].name},
        }
        others = settings.get(_MORE_CALLBACKS, [])
        others = others if isinstance(others, list) else [others]
        return layer_settings(settings, {_MORE_CALLBACKS: [*others, callback]})

    @cached_property
    def _allowed(self) -> set[tuple[str, ...]]:
        """Names of arms and listed levels that ``exclude`` leaves."""
        points = (point for point in expand(self._study) if point.seed == self._study.seeds[0])
        return {self._listed(point.arm, point.levels) for point in points}

    def _listed(self, arm: str, labels: Mapping[str, str]) -> tuple[str, ...]:
        listed = [axis.label for axis in self._study.axes if axis.range is None]
        return (arm, *(labels[label] for label in listed))

    def _levels(self, params: Mapping[str, Any]) -> dict[str, Level]:
        return {axis.label: _level(axis, params[axis.label]) for axis in self._study.axes}


def _distribution(axis: Axis) -> "BaseDistribution":
    kinds = import_optuna().distributions
    drawn = axis.range
    if drawn is None:
        made: BaseDistribution = kinds.CategoricalDistribution([one.label for one in axis.levels])
    elif drawn.is_integer:
        made = kinds.IntDistribution(int(drawn.low), int(drawn.high), log=drawn.log)
    else:
        made = kinds.FloatDistribution(float(drawn.low), float(drawn.high), log=drawn.log)
    return made


def _level(axis: Axis, drawn: Any) -> Level:
    if axis.range is None:
        return next(level for level in axis.levels if level.label == drawn)
    label = str(drawn) if isinstance(drawn, int) else f"{drawn:.4g}"
    return Level(label=label, settings=dict.fromkeys(axis.keys, drawn))
