"""What a study's file says of the numbers that are compared, and of their plots."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from segalign.launch.study import MetricSpec, PlotSettings
from segalign.launch.study_place import Place, as_dataclass, as_list, as_mapping, brief, near

_LESS_IS_BETTER: Final = frozenset({"loss", "fid", "frechet", "kid", "cmmd", "drift"})


def read_metrics(
    content: Mapping[str, Any], stages: Sequence[str], place: Place
) -> tuple[MetricSpec, ...]:
    """Read ``metrics``; none is fine.

    Args:
        content: The whole study.
        stages: What its runs do.
        place: Its file.

    Raises:
        ConfigError: If one does not fit, or is there twice.
    """
    if "metrics" not in content:
        return ()
    here = place.of("`metrics`")
    found: dict[str, MetricSpec] = {}
    for entry in as_list(content["metrics"], here, "[val/loss]"):
        metric = _read_metric(entry, stages, here)
        if metric.name in found:
            raise here.error("each metric once", f"`{metric.name}` twice", "remove one of them")
        found[metric.name] = metric
    return tuple(found.values())


def _read_metric(entry: Any, stages: Sequence[str], here: Place) -> MetricSpec:
    given = {"name": entry} if isinstance(entry, str) else entry
    given = as_mapping(given, here, "{name: test/fid, label: FID, mode: min}")
    if not isinstance(given.get("name"), str):
        raise here.error("the name of each metric", brief(dict(given)), "add `name`")
    defaults = {"label": given["name"], "mode": _usual_mode(given["name"])}
    metric = as_dataclass(MetricSpec, {**defaults, **given}, here.of(f"`{given['name']}`"), "")
    kind = metric.name.partition("/")[0]
    if kind not in ("train", "val", "test") or metric.name.endswith("/"):
        advice = "write it as it is logged"
        raise here.error("`train/...`, `val/...` or `test/...`", f"`{metric.name}`", advice)
    if kind == "test" and "test" not in stages:
        advice = "write `stages: [fit, test]`"
        raise here.error("metrics of stages that are run", f"`{metric.name}`", advice)
    return metric


def _usual_mode(name: str) -> str:
    """Tell by its name which direction of a number is the better one."""
    words = set(name.replace("/", "_").split("_"))
    return "min" if words & _LESS_IS_BETTER else "max"


def read_plots(content: Any, metrics: Sequence[MetricSpec], place: Place) -> PlotSettings:
    """Read ``plots``.

    Raises:
        ConfigError: If it does not fit, or a trade-off is of a number that is no metric.
    """
    here = place.of("`plots`")
    plots = as_dataclass(PlotSettings, content, here, "{pareto: [[val/loss, test/fid]]}")
    names = [metric.name for metric in metrics]
    for name in (name for pair in plots.pareto for name in pair):
        if name not in names:
            advice = near(name, names) if names else "list it under `metrics`"
            raise here.error("names that `metrics` has in `pareto`", f"`{name}`", advice)
    return plots
