"""What a started study can be asked: how far it is, and what came out."""

import sys
from collections.abc import Mapping, Sequence
from typing import Final, Literal

from rich.console import Console

from segalign.atomic import write_text_atomic
from segalign.errors import ConfigError, DataError
from segalign.launch.findings.ablation import AblationTable
from segalign.launch.findings.ablation_formats import (
    to_csv,
    to_latex,
    to_markdown,
    to_rich,
    to_runs_csv,
)
from segalign.launch.findings.ablation_numbers import make_table
from segalign.launch.findings.unknown_names import first_of, unknown_now
from segalign.launch.plan import PLAN_FILE, Plan, unique_runs
from segalign.launch.planning import plan_is_stale
from segalign.launch.running.cancelling import cancel_local
from segalign.launch.running.observing import ObservedRun, observe
from segalign.launch.running.run_state import RunStatus
from segalign.launch.running.status_table import failure_lines, status_rows, summary
from segalign.launch.slurm.slurm_commands import ClusterError
from segalign.launch.slurm.slurm_jobs import cancel_jobs, queued_runs
from segalign.launch.study import Study
from segalign.metrics.report_table import wide_console

TableFormat = Literal["text", "markdown", "csv", "latex"]
_SUFFIXES: Final[Mapping[str, str]] = {"markdown": "md", "csv": "csv", "latex": "tex"}


def show_status(study: Study) -> None:
    """Print how far every run is.

    Raises:
        DataError: If the study has not been started.
    """
    _, observed = look(study)
    wide_console().print(status_rows(observed).to_rich())
    for line in failure_lines(observed):
        say(line)
    say_unknown(study, observed)
    say(summary(observed))


def cancel(study: Study) -> None:
    """Stop all that runs or waits; finished runs stay.

    Raises:
        DataError: If the study has not been started.
        ClusterError: If the cluster does not answer; nothing runs on this machine all the same.
    """
    plan = Plan.load(study.folder)
    try:
        # First: a job on this very machine would take the end of its processes for a failure.
        of_jobs = cancel_jobs(study.folder)
    finally:
        here = cancel_local(unique_runs(plan.runs))
    # Nodes of a cluster may be this machine.
    num_here = len({path.absolute() for path in here}.difference(of_jobs))
    say(f"stopped {num_here} runs on this machine and {len(of_jobs)} on the cluster")
    if shared := _shared(study, plan):
        say(
            f"note: other studies wait for {sum(shared.values())} of the cancelled runs too: "
            f"{', '.join(f'`{name}` ({count})' for name, count in shared.items())}"
        )


def _shared(study: Study, plan: Plan) -> dict[str, int]:
    """Count, by study, the cancelled runs that studies beside this one have in their plans."""
    cancelled = {
        one.run.directory
        for one in observe(unique_runs(plan.runs))
        if one.status is RunStatus.CANCELLED
    }
    found = {}
    for path in sorted(study.folder.parent.glob(f"*/{PLAN_FILE}")):
        if path.parent == study.folder or not cancelled:
            continue
        try:
            other = Plan.load(path.parent)
        except DataError:
            continue
        if common := cancelled & {run.directory for run in other.runs}:
            found[other.study] = len(common)
    return found


def show_table(study: Study, kind: TableFormat) -> None:
    """Print the table, and keep it in the study's folder in all formats.

    Raises:
        DataError: If the study has not been started, or numbers may not be compared.
        ConfigError: If a metric is not known; the table is printed first.
    """
    plan, observed = look(study)
    table = make_table(study, plan, observed)
    if kind == "text":
        wide_console().print(to_rich(table))
    texts = {"markdown": to_markdown(table), "csv": to_csv(table), "latex": to_latex(table)}
    if kind != "text":
        sys.stdout.write(texts[kind])
    for name, text in texts.items():
        write_text_atomic(study.folder / f"table.{_SUFFIXES[name]}", text)
    write_text_atomic(study.folder / "runs.csv", to_runs_csv(table))
    refuse_unknown(table)


def refuse_unknown(table: AblationTable, curves: Sequence[str] = ()) -> None:
    """End with an error if no finished run has a metric; what has numbers has been shown.

    Args:
        table: Whose metrics they are.
        curves: A line for each curve that nobody has logged.

    Raises:
        ConfigError: If there is one.
    """
    if lines := [*table.unknown.values(), *curves]:
        raise ConfigError(first_of(lines))


def say_unknown(study: Study, observed: Sequence[ObservedRun]) -> None:
    """Print a line if no finished run has a metric that the study names."""
    if lines := unknown_now(study, observed):
        say(f"note: {first_of(lines)}")


def look(study: Study) -> tuple[Plan, list[ObservedRun]]:
    """Read the plan of a started study, and see how far its runs are.

    A cluster that does not answer is told of: what waits in its queue looks as if nobody had it.

    Raises:
        DataError: If the study has not been started.
    """
    plan = Plan.load(study.folder)
    if plan_is_stale(study, plan):
        say(
            "note: the study or one of its configs has changed since `sweep run`; this is of the "
            "plan made then"
        )
    try:
        queued = queued_runs(study.folder)
    except ClusterError as error:
        queued = {}
        say(f"note: runs in the cluster's queue are not shown as such: {error}")
    return plan, observe(unique_runs(plan.runs), queued)


def say(text: str) -> None:
    """Print text as it is."""
    Console().print(text, soft_wrap=True, markup=False, highlight=False)
