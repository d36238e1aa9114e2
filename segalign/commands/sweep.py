"""``main.py sweep``: studies, from a YAML file to jobs, tables, plots and a report."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from segalign.commands.parsing import parse_arguments
from segalign.errors import ConfigError

COMMANDS: Final[Mapping[str, str]] = {
    "plan": "check every run's config, and show what would be run",
    "run": "start what has never been run",
    "status": "show how far every run is",
    "resume": "start what is not done and does not run, failed runs too",
    "retry": "start runs that have failed",
    "cancel": "stop everything that runs or waits",
    "table": "variants by metrics, with intervals over seeds",
    "plot": "curves, main effects and trade-offs",
    "report": "one page with table, plots, and images of all variants side by side",
    "execute": "what a job does: one run of a study; `run` starts it",
}
_STARTING: Final = ("run", "resume", "retry")


def run(
    argv: Sequence[str],
    resolve_configs: Callable[[Sequence[str]], Any],
    program: Sequence[str],
) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: Arguments after the command.
        resolve_configs: Opens the parser of runs, given the packages that configs may name.
        program: Command line of ``main.py``.

    Raises:
        SegalignError: If the arguments do not fit or the command fails.
    """
    options = parse_arguments(build_parser(), argv, list(COMMANDS))
    name, own = options.command, options[options.command]
    if name == "execute":
        return _execute(own, program)
    if name in _STARTING:
        return _start(name, own, resolve_configs, program)
    if name == "plan":
        _plan(own, resolve_configs, program)
    else:
        _look(name, own)
    return 0


def build_parser() -> ArgumentParser:
    """Build the parser of the command's arguments."""
    parser = ArgumentParser(
        prog="main.py sweep",
        description="studies: many runs that differ in arms, grid points and seeds",
        exit_on_error=False,
    )
    commands = parser.add_subcommands(dest="command", metavar=" | ".join(COMMANDS))
    for name, description in COMMANDS.items():
        own = ArgumentParser(description=description)
        (_add_execute if name == "execute" else _add_study)(own)
        _add_own(own, name)
        commands.add_subcommand(name, own, help=description)
    return parser


def _add_study(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("study", type=str, help="YAML file of the study")
    add("--base", type=str, action="append", default=[], help="instead of the study's `base`")
    add("--folder", type=str | None, help="instead of the study's `folder`")


def _add_own(parser: ArgumentParser, name: str) -> None:
    add = parser.add_argument
    if name in ("plan", "run"):
        add(
            "--allow_import",
            type=str,
            action="append",
            default=[],
            help="package whose classes configs may name too",
        )
    if name in _STARTING:
        add("--local", type=PositiveInt | None, help="so many runs at a time, on this machine")
        add("--slurm", action="store_true", help="as one array job of a SLURM cluster")
    if name == "retry":
        add("--failed", action="store_true", help="all that have failed")
    if name == "table":
        add("--format", choices=["text", "markdown", "csv", "latex"], default="text")
    if name == "plot":
        add("--format", choices=["png", "pdf", "svg"], default="png")


def _add_execute(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("run_dir", type=str | None, nargs="?", help="run directory")
    add("--runs-file", type=str | None, help="file with a run directory on each line")
    add("--attempt", type=PositiveInt | None, help="make this attempt, or none")
    add("--task", type=NonNegativeInt | None, help="number of the task, from 0")
    add("--runs-per-task", type=PositiveInt, default=1, help="lines of the file for each task")
    add("--launcher", type=str, default="", help="what starts the processes of a run")
    add("--preempting-signal", type=str | None, help="signal that announces a preemption")
    add("--max-requeues", type=NonNegativeInt, default=20, help="of a job before its run begins")
    add("--option", type=str, action="append", default=[], help="one more argument of the run")


def _study(options: Namespace) -> Any:
    from segalign.launch.study_file import load_study

    return load_study(
        Path(options.study),
        base=[Path(path) for path in options.base] or None,
        folder=None if options.folder is None else Path(options.folder),
    )


def _plan(options: Namespace, resolve_configs: Callable[..., Any], program: Sequence[str]) -> None:
    from segalign.launch.starting import show_plan

    show_plan(_study(options), resolve_configs(options.allow_import), program)


def _start(
    name: str,
    options: Namespace,
    resolve_configs: Callable[[Sequence[str]], Any],
    program: Sequence[str],
) -> int:
    if name == "retry" and not options.failed:
        raise ConfigError("expected `--failed` for `sweep retry`; got nothing to choose runs by.")
    if options.slurm and options.local is not None:
        raise ConfigError("expected `--local N` or `--slurm`; got both. Give one of them.")
    from segalign.launch.launcher import Backend, Launcher
    from segalign.launch.plan import Plan
    from segalign.launch.starting import start_study

    study = _study(options)
    if name != "run":
        Plan.load(study.folder)  # says so if nothing was ever started
    chosen: Backend | None = "slurm" if options.slurm else None
    if options.local is not None:
        chosen = "local"
    launcher = Launcher.choose(
        study.folder, chosen, options.local, getattr(options, "allow_import", None)
    )
    return start_study(name, study, launcher, resolve_configs, program)


def _look(name: str, options: Namespace) -> None:
    from segalign.launch import looking

    study = _study(options)
    if name == "status":
        looking.show_status(study)
    elif name == "cancel":
        looking.cancel(study)
    elif name == "table":
        looking.show_table(study, options.format)
    else:
        from segalign.launch import showing

        if name == "plot":
            showing.write_plots(study, options.format)
        else:
            showing.write_page(study)


def _execute(options: Namespace, program: Sequence[str]) -> int:
    if (options.run_dir is None) == (options.runs_file is None):
        raise ConfigError("expected a run directory or `--runs-file` for `sweep execute`.")
    settings: dict[str, Any] = {
        "launcher": shlex.split(options.launcher),
        "options": options.option,
        "preempting_signal": options.preempting_signal,
        "max_requeues": options.max_requeues,
    }
    if options.run_dir is not None:
        from segalign.launch.running.execute import execute_run

        if options.attempt is not None:
            settings["attempt"] = options.attempt
        return execute_run(Path(options.run_dir), program, **settings)
    if options.task is None:
        raise ConfigError("expected `--task` with `--runs-file`; got none.")
    from segalign.launch.slurm.slurm_task import run_task

    return run_task(
        Path(options.runs_file),
        options.task,
        program,
        runs_per_task=options.runs_per_task,
        **settings,
    )
