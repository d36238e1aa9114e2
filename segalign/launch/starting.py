"""Start the runs of a study: all that are new, all that are not done, or those that failed."""

from collections.abc import Callable, Sequence
from typing import Final

from segalign.atomic import make_directory, write_bytes_atomic
from segalign.errors import ConfigError, SegalignError
from segalign.launch.launcher import Launcher
from segalign.launch.looking import say, say_unknown
from segalign.launch.plan import PLAN_FILE, Plan, PlannedRun, ResolveConfig, unique_runs
from segalign.launch.plan_table import plan_rows
from segalign.launch.planning import PlannedStudy, plan_is_stale, plan_study, prepare_run
from segalign.launch.running.local_controller import run_local
from segalign.launch.running.observing import ObservedRun, observe
from segalign.launch.running.run_state import ACTIVE, FINISHED, RunStatus
from segalign.launch.running.status_table import (
    describe_change,
    failure_lines,
    num_failed,
    summary,
)
from segalign.launch.searching.search import OptunaSearch
from segalign.launch.searching.search_rounds import search_round
from segalign.launch.slurm.sbatch_script import sbatch_text
from segalign.launch.slurm.slurm_jobs import queued_runs, submit
from segalign.launch.slurm.slurm_records import next_record_file
from segalign.launch.study import Study
from segalign.metrics.report_table import wide_console

STUDY_COPY: Final = "study.yaml"

OpenResolver = Callable[[Sequence[str]], ResolveConfig]


def show_plan(study: Study, resolve: ResolveConfig, program: Sequence[str]) -> None:
    """Print what would be run, after every config has passed the parser; nothing is written.

    Raises:
        ConfigError: If a config does not fit, or the budget is too small.
    """
    planned = plan_study(study, resolve)
    console = wide_console()
    console.print(plan_rows(planned).to_rich())
    say(planned.summary())
    if study.slurm is not None:
        per_task = study.slurm.runs_per_task
        num_tasks = -(-len(unique_runs(planned.plan.runs)) // per_task)
        runs_file = next_record_file(study.folder).with_suffix(".runs")
        text = sbatch_text(
            study, num_tasks=num_tasks, runs_file=runs_file, program=program, options=()
        )
        say(f"\nWith `--slurm`, this job:\n\n{text}")
    else:
        say(
            "no job is shown, because the study has no `slurm` block: add one, such as "
            '`slurm: {time: "02:00:00", gpus_per_node: 1}`, and plan again'
        )


def start_study(
    command: str,
    study: Study,
    launcher: Launcher,
    open_resolver: OpenResolver,
    program: Sequence[str],
) -> int:
    """Start runs; on this machine, wait for them.

    Args:
        command: ``run``, ``resume`` or ``retry``: which runs.
        study: The study.
        launcher: Where.
        open_resolver: Opens the parser of runs, given the packages that configs may name.
        program: Command line of ``main.py``.

    Raises:
        SegalignError: If a config does not fit, or runs have failed.
    """
    if study.search is not None:
        return _search(command, study, launcher, open_resolver(launcher.allow_import), program)
    if command == "run":
        planned = plan_study(study, open_resolver(launcher.allow_import))
        _keep(study, planned, planned.plan.runs, launcher)
        plan = planned.plan
    else:
        plan = Plan.load(study.folder)
        if plan_is_stale(study, plan):
            say(
                "note: the study or one of its configs has changed since `sweep run`; this starts "
                "runs as they were planned then, and `sweep run` those of now"
            )
        launcher.save(study.folder)
    _launch(study, _chosen(command, _observe(study, plan), launcher), launcher, program)
    if launcher.backend == "local":
        _refuse_failed(study, _observe(study, plan))
    return 0


def _search(
    command: str,
    study: Study,
    launcher: Launcher,
    resolve: ResolveConfig,
    program: Sequence[str],
) -> int:
    """Let a searcher propose runs: one round for a cluster, all of them on this machine."""
    is_local = launcher.backend == "local"
    at_most = None if study.slurm is None else study.slurm.max_parallel
    num_open = launcher.num_parallel if is_local else at_most or 1
    while True:
        plan = _known_plan(study)
        observed = [] if plan is None else _observe(study, plan)
        planned, new = search_round(study, resolve, plan, observed, num_open)
        _keep(study, planned, new, launcher)
        observed = _observe(study, planned.plan)
        runs = _chosen(command, observed, launcher)
        if runs or not is_local:
            _launch(study, runs, launcher, program)
        if not runs or not is_local or _is_cancelled(runs):
            break
        # What has failed is started once by a command, not in every round.
        command = "run"
    found = OptunaSearch(study, planned.plan).best()
    if found is not None:
        say(f"best so far: {found[0]}, {study.metrics[0].label} {found[1]:.4g}")
    if is_local:
        _refuse_failed(study, _observe(study, planned.plan))
    return 0


def _is_cancelled(runs: Sequence[PlannedRun]) -> bool:
    """Tell whether runs that were just waited for have been cancelled, and with them the search."""
    return any(one.status is RunStatus.CANCELLED for one in observe(runs))


def _known_plan(study: Study) -> Plan | None:
    return Plan.load(study.folder) if (study.folder / PLAN_FILE).is_file() else None


def _keep(
    study: Study, planned: PlannedStudy, runs: Sequence[PlannedRun], launcher: Launcher
) -> None:
    """Write what later commands read; the plan comes last, so that all of its runs are there."""
    make_directory(study.folder)
    for run in unique_runs(runs):
        try:
            prepare_run(run, planned.configs[run.run_id], study.name)
        except ConfigError as error:  # one that cannot be prepared counts as failed
            say(f"note: {run.label}, seed {run.seed} is left out: {error}")
    write_bytes_atomic(study.folder / STUDY_COPY, study.file.read_bytes())
    launcher.save(study.folder)
    planned.plan.save(study.folder)


def _observe(study: Study, plan: Plan) -> list[ObservedRun]:
    return observe(unique_runs(plan.runs), queued_runs(study.folder))


def _chosen(command: str, observed: Sequence[ObservedRun], launcher: Launcher) -> list[PlannedRun]:
    """Choose the runs that a command starts; on this machine, also those that it waits for."""
    left_out = {*FINISHED, *ACTIVE}
    if launcher.backend == "local":
        left_out.remove(RunStatus.RUNNING)
    if command == "run":
        left_out.add(RunStatus.FAILED)
    if command == "retry":
        left_out = set(RunStatus) - {RunStatus.FAILED}
    return [one.run for one in observed if one.status not in left_out]


def _launch(
    study: Study, runs: Sequence[PlannedRun], launcher: Launcher, program: Sequence[str]
) -> None:
    if not runs:
        say("nothing to start")
    elif launcher.backend == "slurm":
        job = submit(study, runs, program, launcher.options)
        if not job.runs:
            say(f"nothing to start: the queue has all of them already, as {job.job_id}")
            return
        say(f"{len(job.runs)} runs are put into the queue as job {job.job_id}: {job.script}")
    else:
        say(_what_begins(observe(runs), launcher.num_parallel))
        run_local(
            runs,
            program,
            num_parallel=launcher.num_parallel,
            options=launcher.options,
            on_change=lambda one: say(describe_change(one)),
        )


def _what_begins(observed: Sequence[ObservedRun], num_parallel: int) -> str:
    """Tell the runs that are started from those that another command has in hand."""
    num_held = sum(one.status is RunStatus.RUNNING for one in observed)
    num_new = len(observed) - num_held
    waiting = f"waiting for {_runs(num_held)} that another command has started"
    if not num_new:
        return waiting
    starting = f"starting {_runs(num_new)}, {num_parallel} at a time"
    return f"{starting}; {waiting}" if num_held else starting


def _runs(number: int) -> str:
    return f"{number} run{'' if number == 1 else 's'}"


def _refuse_failed(study: Study, observed: Sequence[ObservedRun]) -> None:
    """Say how the study stands; end with an error if runs have failed."""
    say_unknown(study, observed)
    say(summary(observed))
    failures = failure_lines(observed)
    for line in failures[1:]:
        say(line)
    if failures:
        raise SegalignError(
            f"expected all runs to end well; {num_failed(observed)} of {len(observed)} failed: "
            f"{failures[0].rstrip('.')}. "
            f"Mend it, then `python main.py sweep retry {study.file} --failed`."
        )
