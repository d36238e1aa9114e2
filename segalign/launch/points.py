"""The runs of a study before their configs are known: arms x grid x zipped groups x seeds."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segalign.launch.study import Arm, Axis, Level, Study
from segalign.launch.study_axes import axis_levels
from segalign.launch.study_place import Place, brief, near

UNNAMED = Arm(name="base")


@dataclass(frozen=True, kw_only=True)
class RunPoint:
    """What one run is to be.

    Attributes:
        label: Of its variant: all but the seed.
        arm: Name of its arm.
        levels: Labels of its levels, by the labels of axes.
        seed: Its seed.
        configs: Config files, the base first.
        settings: Values by dotted key, which win over files; later ones win over earlier ones.
        trial: Number of a searcher's trial; None of others.
    """

    label: str
    arm: str
    levels: Mapping[str, str]
    seed: int
    configs: tuple[Path, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    trial: int | None = None


def expand(study: Study) -> list[RunPoint]:
    """List the runs of a study: arms, in each all points of the axes, at each all seeds.

    A range counts as its two ends.

    Raises:
        ConfigError: If ``exclude`` names what is not there, or leaves nothing.
    """
    points = list(_all_points(study))
    for number, conditions in enumerate(study.exclude, start=1):
        place = Place(study.file, f"entry {number} of `exclude`")
        matchers = [
            _matcher(study, points, key, wanted, place) for key, wanted in conditions.items()
        ]
        matched = {id(point) for point in points if all(meets(point) for meets in matchers)}
        if not matched:
            advice = "correct it; entries before it may have left these runs out already"
            raise place.error("conditions that a run meets", brief(dict(conditions)), advice)
        points = [point for point in points if id(point) not in matched]
    if not points:
        raise Place(study.file, "`exclude`").error(
            "runs that are left", "none", "exclude fewer of them"
        )
    return points


def run_label(arm: Arm, levels: Mapping[str, str], *, is_only_arm: bool) -> str:
    """Name a variant: the arm, unless it is the only one and changes nothing, then its levels."""
    parts = [] if is_only_arm and arm == UNNAMED else [arm.name]
    parts += [f"{axis}={level}" for axis, level in levels.items()]
    return ", ".join(parts) or arm.name


def layer_settings(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Join settings; a later value of a key takes the place of an earlier one, and comes last."""
    joined: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            joined.pop(key, None)
            joined[key] = value
    return joined


def _all_points(study: Study) -> Iterator[RunPoint]:
    for arm in study.arms:
        for levels in itertools.product(*map(axis_levels, study.axes)):
            for seed in study.seeds:
                yield _point(study, arm, levels, seed)


def _point(study: Study, arm: Arm, levels: Sequence[Level], seed: int) -> RunPoint:
    labels = {axis.label: level.label for axis, level in zip(study.axes, levels, strict=True)}
    varied = [level.settings for level in levels]
    return RunPoint(
        label=run_label(arm, labels, is_only_arm=len(study.arms) == 1),
        arm=arm.name,
        levels=labels,
        seed=seed,
        configs=(*study.base, *arm.configs),
        settings=layer_settings(study.settings, arm.settings, *varied),
    )


def _matcher(
    study: Study, points: Sequence[RunPoint], key: str, wanted: Any, place: Place
) -> "_Condition":
    """Make one condition of ``exclude``; each of its values must be that of some run."""
    axes = {axis.label: axis for axis in study.axes}
    known = {"arm", "seed", *axes, *(name for point in points for name in point.settings)}
    if key not in known:
        raise place.error("an axis, a dotted key, `arm` or `seed`", f"`{key}`", near(key, known))
    values = wanted if isinstance(wanted, list) else [wanted]
    for value in values:
        alone = _Condition(key, [value], axes.get(key))
        if not any(alone(point) for point in points):
            present = dict.fromkeys(shown for point in points for shown in alone.shown(point))
            raise place.error(
                f"a value that runs have of `{key}`", brief(value), f"known: {', '.join(present)}"
            )
    return _Condition(key, values, axes.get(key))


@dataclass(frozen=True)
class _Condition:
    """Whether a run has one of some values."""

    key: str
    values: Sequence[Any]
    axis: Axis | None

    def __call__(self, point: RunPoint) -> bool:
        found = self._values_of(point)
        return any(_equal(value, one) for value in self.values for one in found)

    def shown(self, point: RunPoint) -> list[str]:
        """Show what a run has; its first name is enough."""
        return [str(one) for one in self._values_of(point)[:1]]

    def _values_of(self, point: RunPoint) -> list[Any]:
        if self.key == "arm":
            return [point.arm]
        if self.key == "seed":
            return [point.seed]
        if self.axis is None:
            return [point.settings[self.key]] if self.key in point.settings else []
        return [point.levels[self.key], *(point.settings[key] for key in self.axis.keys)]


def _equal(wanted: Any, value: Any) -> bool:
    """Compare as a reader would: 1 is 1.0, but neither is true."""
    return wanted == value and isinstance(wanted, bool) == isinstance(value, bool)
