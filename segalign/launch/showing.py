"""Draw the plots of a study and write its report."""

from collections.abc import Sequence
from typing import Final, Literal

from segalign.atomic import make_directory, write_bytes_atomic
from segalign.launch.findings.ablation import AblationTable
from segalign.launch.findings.ablation_numbers import make_table
from segalign.launch.findings.plot_fonts import missing_line
from segalign.launch.findings.study_plots import StudyPlot, draw_study, fonts_of
from segalign.launch.findings.study_report import write_report
from segalign.launch.findings.unknown_names import unknown_curves
from segalign.launch.looking import look, refuse_unknown, say
from segalign.launch.plan import Plan
from segalign.launch.running.observing import ObservedRun
from segalign.launch.running.status_table import summary
from segalign.launch.study import Study

REPORT_FILE: Final = "report.html"

PlotFormat = Literal["png", "pdf", "svg"]


def write_plots(study: Study, suffix: PlotFormat) -> None:
    """Write the plots into the study's folder, and print their paths.

    Raises:
        DataError: If the study has not been started, or numbers may not be compared.
        ConfigError: If a metric is not known.
    """
    plan, observed = look(study)
    table = make_table(study, plan, observed)
    folder = study.folder / "plots"
    plots = _draw(study, plan, table, observed)
    curves = list(unknown_curves(study, observed).values())
    if not plots:
        refuse_unknown(table, curves)
        say("nothing to draw: no run has logged a number yet")
        return
    make_directory(folder)
    for plot in plots:
        path = folder / f"{plot.stem}.{suffix}"
        write_bytes_atomic(path, plot.to_bytes(suffix))
        say(f"{path}: {plot.alt}")
    refuse_unknown(table, curves)


def write_page(study: Study) -> None:
    """Write the report into the study's folder, and print its path.

    Raises:
        DataError: If the study has not been started, or numbers may not be compared.
        ConfigError: If a metric is not known.
    """
    plan, observed = look(study)
    table = make_table(study, plan, observed)
    plots = {plot.alt: plot.to_bytes() for plot in _draw(study, plan, table, observed)}
    path = study.folder / REPORT_FILE
    write_report(study, plan, observed, table, plots, path)
    say(f"{summary(observed)}: {path}")
    refuse_unknown(table, list(unknown_curves(study, observed).values()))


def _draw(
    study: Study, plan: Plan, table: AblationTable, observed: Sequence[ObservedRun]
) -> list[StudyPlot]:
    plots = list(draw_study(study, plan, table, observed).values())
    if plots and (line := missing_line(fonts_of(study, table))):
        say(f"note: {line}")
    return plots
