"""All pictures of a study: curves, main effects, differences to the base, and Pareto fronts."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib import rc_context
from matplotlib.figure import Figure

from segalign.errors import ConfigError
from segalign.launch.findings.ablation import AblationTable
from segalign.launch.findings.curve_plots import VariantCurves, describe_curves, draw_curves
from segalign.launch.findings.effect_plots import (
    draw_differences,
    draw_main_effects,
    draw_samples,
)
from segalign.launch.findings.main_effects import ARM_AXIS, MainEffect, main_effect, points_of
from segalign.launch.findings.pareto_plots import draw_pareto, pareto_points
from segalign.launch.findings.plot_fonts import (
    ChosenFonts,
    choose_fonts,
    without_glyph_warnings,
)
from segalign.launch.findings.run_metrics import TEST_PREFIX, RunNumbers
from segalign.launch.findings.variant_styles import VariantStyle, variant_styles
from segalign.launch.plan import Plan, unique_runs
from segalign.launch.running.observing import ObservedRun
from segalign.launch.running.run_state import FINISHED
from segalign.launch.study import MetricSpec, Study

_DPI = 130


@dataclass(frozen=True)
class StudyPlot:
    """A picture.

    Attributes:
        stem: Of its file.
        alt: What it shows, for those who do not see it.
        figure: The picture.
    """

    stem: str
    alt: str
    figure: Figure

    def to_bytes(self, suffix: Literal["png", "pdf", "svg"] = "png") -> bytes:
        """Return the picture as a file, the same bytes each time."""
        content = io.BytesIO()
        dates = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
        with rc_context({"svg.hashsalt": self.stem}), without_glyph_warnings():
            # Laid out once: a layout that starts from the last one differs from it in a hair.
            self.figure.draw_without_rendering()
            self.figure.set_layout_engine("none")
            self.figure.savefig(content, format=suffix, dpi=_DPI, metadata=dates[suffix])
        return content.getvalue()


def draw_study(
    study: Study, plan: Plan, table: AblationTable, observed: Sequence[ObservedRun]
) -> dict[str, StudyPlot]:
    """Draw all that there are numbers for.

    Args:
        study: The study; ``plots`` says which curves and which pairs.
        plan: Its runs.
        table: Its numbers.
        observed: Where runs stand.

    Returns:
        Pictures by stem, in the order that people read them.

    Raises:
        ConfigError: If a pair names what is no metric of the study.
    """
    styles = variant_styles(table)
    with fonts_of(study, table).used():
        plots = [
            _curves(study, plan, observed, styles),
            _effects(study, plan, table),
            _samples(study, plan, table),
            _differences(table, styles),
            *(_pareto(study, table, pair, styles) for pair in study.plots.pareto),
        ]
    return {plot.stem: plot for plot in plots if plot is not None}


def fonts_of(study: Study, table: AblationTable) -> ChosenFonts:
    """Find fonts for all that the plots of a study say."""
    axes = [axis.label for axis in study.axes]
    axes += [level.label for axis in study.axes for level in axis.levels]
    metrics = [text for metric in table.metrics for text in (metric.name, metric.label)]
    rows = [row.label for row in table.rows]
    return choose_fonts([*axes, *metrics, *rows, *(study.plots.curves or ())])


def _curves(
    study: Study,
    plan: Plan,
    observed: Sequence[ObservedRun],
    styles: Mapping[str, VariantStyle],
) -> StudyPlot | None:
    names = study.plots.curves
    if names is None:
        names = [m.name for m in study.metrics if not m.name.startswith(TEST_PREFIX)]
    done = {one.run.run_id for one in observed if one.status in FINISHED}
    numbers = {run.run_id: RunNumbers(run.directory) for run in unique_runs(plan.runs)}
    curves: dict[str, dict[str, VariantCurves]] = {}
    for name in names:
        for label in styles:
            found = {
                run.run_id: curve
                for run in plan.of(label)
                if (curve := numbers[run.run_id].curve(name))
            }
            if found:
                curves.setdefault(name, {})[label] = VariantCurves(
                    [curve for run_id, curve in found.items() if run_id in done],
                    [curve for run_id, curve in found.items() if run_id not in done],
                )
    if not curves:
        return None
    alt = f"{', '.join(curves)} over training: {describe_curves(curves)}"
    return StudyPlot("curves", alt, draw_curves(curves, styles))


def _effects(study: Study, plan: Plan, table: AblationTable) -> StudyPlot | None:
    if not study.axes:
        return None
    axes = [axis.label for axis in study.axes if axis.range is None]
    axes = [*([ARM_AXIS] if len(study.arms) > 1 else []), *axes]
    effects: dict[str, dict[str, MainEffect]] = {}
    for metric in table.metrics:
        for axis in axes:
            if (found := main_effect(plan, table, metric.name, axis)) is not None:
                effects.setdefault(metric.name, {})[axis] = found
    metrics = [metric for metric in table.metrics if metric.name in effects]
    if not metrics:
        return None
    alt = (
        f"main effects of {', '.join(axes)} on {_labels(metrics)}: mean over all else at each "
        "level, and its 95 % interval over seeds"
    )
    return StudyPlot("main_effects", alt, draw_main_effects(effects, metrics))


def _samples(study: Study, plan: Plan, table: AblationTable) -> StudyPlot | None:
    """Draw the first metric over what a searcher drew."""
    if not table.metrics:
        return None
    metric = table.metrics[0]
    points = points_of(plan)
    samples: dict[str, list[tuple[float, float]]] = {}
    for axis in (axis for axis in study.axes if axis.range is not None):
        for row in table.rows:
            found = row.cells[metric.name].interval
            if found is not None and axis.label in points[row.label]:
                drawn = float(points[row.label][axis.label])
                samples.setdefault(axis.label, []).append((drawn, found.mean))
    if not samples:
        return None
    on_log = {axis.label for axis in study.axes if axis.range is not None and axis.range.log}
    alt = f"{metric.label} of each trial over {', '.join(samples)}"
    return StudyPlot("samples", alt, draw_samples(samples, metric, on_log))


def _differences(table: AblationTable, styles: Mapping[str, VariantStyle]) -> StudyPlot | None:
    metrics = [
        metric
        for metric in table.metrics
        if any(row.label in styles and row.cells[metric.name].difference for row in table.rows)
    ]
    if not metrics:
        return None
    alt = f"differences of variants to {table.base_label} in {_labels(metrics)}, 95 % intervals"
    return StudyPlot("differences", alt, draw_differences(table, metrics, styles))


def _pareto(
    study: Study, table: AblationTable, pair: tuple[str, str], styles: Mapping[str, VariantStyle]
) -> StudyPlot | None:
    x, y = (_metric(study, name) for name in pair)
    if not pareto_points(table, (x, y)):
        return None
    stem = re.sub(r"[^\w-]+", "_", f"pareto-{x.name}-{y.name}")
    alt = f"{y.label} against {x.label} for each variant, with 95 % intervals and the Pareto front"
    return StudyPlot(stem, alt, draw_pareto(table, (x, y), styles))


def _metric(study: Study, name: str) -> MetricSpec:
    for metric in study.metrics:
        if metric.name == name:
            return metric
    raise ConfigError(
        f"expected `plots.pareto` to name metrics of `{study.name}`; got `{name}`; "
        "add it to `metrics`"
    )


def _labels(metrics: Sequence[MetricSpec]) -> str:
    return ", ".join(metric.label for metric in metrics)
