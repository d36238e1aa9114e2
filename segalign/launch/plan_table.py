"""The table of a plan: what its variants are, in which settings they differ, what is done."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from segalign.launch.planning import PlannedStudy
from segalign.launch.study_axes import short_names, short_value
from segalign.metrics.report_table import ReportTable

_MAX_SHOWN: Final = 4
# They differ in every run, and say nothing about its variant.
_OF_EACH_RUN: Final = ("run_dir", "seed_everything", "ckpt_path")


def plan_rows(planned: PlannedStudy) -> ReportTable:
    """Make a table with a row for each variant."""
    plan = planned.plan
    settings = _differing(planned)
    rows = []
    for label in plan.labels:
        runs = plan.of(label)
        num_done = sum(run.run_id in planned.finished for run in runs)
        marked = f"{label} (base)" if label == plan.base_label else label
        rows.append([marked, _shown(settings[label]), str(len(runs)), str(num_done)])
    return ReportTable(f"Plan of {plan.study}", ["variant", "settings", "seeds", "done"], rows)


def _differing(planned: PlannedStudy) -> dict[str, dict[str, Any]]:
    """Find, for each variant, in what variants differ that no axis names, by short names."""
    plan = planned.plan
    flat = {}
    for label in plan.labels:
        configs = planned.configs[plan.of(label)[0].run_id]
        run_dir = str(plan.of(label)[0].directory)
        flat[label] = {
            key: value
            for key, value in _leaves(next(iter(configs.values())), "")
            if key not in _OF_EACH_RUN and not (isinstance(value, str) and run_dir in value)
        }
    keys = list(dict.fromkeys(key for one in flat.values() for key in one))
    by_axes = tuple(key for axis in planned.study.axes for key in axis.keys)
    varied = [
        key
        for key in keys
        if not f"{key}.".startswith(tuple(f"{axis_key}." for axis_key in by_axes))
        and len({repr(one.get(key)) for one in flat.values()}) > 1
    ]
    names = short_names(varied)
    return {
        label: {names[key]: short_value(key, own[key]) for key in varied if key in own}
        for label, own in flat.items()
    }


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """List a config's values by dotted key; a list is one value."""
    if not isinstance(value, Mapping) or not value:
        yield key, value
        return
    for name, child in value.items():
        yield from _leaves(child, f"{key}.{name}" if key else str(name))


def _shown(settings: Mapping[str, str]) -> str:
    pairs = [f"{name}={value}" for name, value in settings.items()]
    more = f" and {len(pairs) - _MAX_SHOWN} more" if len(pairs) > _MAX_SHOWN else ""
    return ", ".join(pairs[:_MAX_SHOWN]) + more
