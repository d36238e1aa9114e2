"""Plan a study: resolve every run's configs before the first one starts."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from segalign.atomic import make_directory, write_text_atomic
from segalign.errors import ConfigError
from segalign.launch.command_lines import put_run_dir, stage_arguments
from segalign.launch.forked_map import forked_map
from segalign.launch.gpu_hours import gpu_hours
from segalign.launch.parser_words import plain_words
from segalign.launch.plan import Plan, PlannedRun, ResolveConfig, unique_runs
from segalign.launch.points import RunPoint, expand
from segalign.launch.running.run_folder import SPEC_FILE, config_file, sweep_folder
from segalign.launch.running.run_spec import NOT_HASHED, read_spec
from segalign.launch.running.run_state import FINISHED, read_state
from segalign.launch.study import Stage, Study
from segalign.launch.yaml_dialect import dump_yaml

_ID_DIGITS: Final = 12
_MAX_NAMED: Final = 4
_SEE: Final = re.compile(r" \(see `[^`]*`\)")

StageConfigs = Mapping[Stage, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class PlannedStudy:
    """A plan, and the configs of its runs.

    Attributes:
        study: The study.
        plan: Its runs.
        configs: Resolved config of each stage, by run id; the run directory is in it.
        finished: Ids of runs that are finished already.
        gpu_hours: What the other runs take at most: each its time limit once. 0 without a cluster.
    """

    study: Study
    plan: Plan
    configs: Mapping[str, StageConfigs]
    finished: frozenset[str]
    gpu_hours: float

    def summary(self) -> str:
        """Say in one line how many runs there are, and what they may take."""
        num_runs = len(unique_runs(self.plan.runs))
        seeds = sorted({run.seed for run in self.plan.runs})
        text = (
            f"{_count(num_runs, 'run')}: {_count(len(self.plan.labels), 'variant')}, "
            f"{_count(len(seeds), 'seed')}; {len(self.finished)} done already"
        )
        if num_runs < len(self.plan.runs):
            text += f"; {len(self.plan.runs) - num_runs} more coincide with them"
        if self.study.search is not None:
            text += f"; a searcher makes {_count(self.study.search.trials, 'trial')} of them"
        if self.study.slurm is None:
            return text
        return f"{text}; at most {self.gpu_hours:.4g} GPU-hours for the rest"


def plan_study(
    study: Study,
    resolve: ResolveConfig,
    points: Sequence[RunPoint] | None = None,
    *,
    num_workers: int | None = None,
) -> PlannedStudy:
    """Resolve the configs of all runs through the parser of runs.

    Args:
        study: The study.
        resolve: The parser.
        points: The runs; None is all of the study, a range by its two ends.
        num_workers: Processes that parse; None is one for each core, if there is enough to do.

    Raises:
        ConfigError: If configs do not fit, each arm with its own reason, or the budget is too
            small.
    """
    points = expand(study) if points is None else points
    jobs = [(point, stage) for point in points for stage in study.stages]

    def attempt(job: tuple[RunPoint, Stage]) -> tuple[dict[str, Any], str]:
        try:
            return resolve(job[1], stage_arguments(study, *job)), ""
        except ConfigError as error:
            return {}, str(error)

    found = forked_map(attempt, jobs, num_workers)
    _refuse_bad([(point, reason) for (point, _), (_, reason) in zip(jobs, found, strict=True)])
    num_stages = len(study.stages)
    runs, configs = [], {}
    for index, point in enumerate(points):
        own = [config for config, _ in found[index * num_stages : (index + 1) * num_stages]]
        run, prepared = _planned(study, point, dict(zip(study.stages, own, strict=True)))
        runs.append(run)
        configs[run.run_id] = prepared
    return _finish(study, runs, configs)


def _planned(
    study: Study, point: RunPoint, configs: dict[Stage, dict[str, Any]]
) -> tuple[PlannedRun, StageConfigs]:
    """Name a run by its configs, and put its directory into them."""
    for stage, config in configs.items():
        config["ckpt_path"] = study.test.checkpoint if stage == "test" else "auto"
    run_id = digest_configs(configs)
    directory = study.runs_folder / run_id
    run = PlannedRun(
        run_id=run_id,
        label=point.label,
        arm=point.arm,
        levels=dict(point.levels),
        seed=point.seed,
        directory=directory,
        trial=point.trial,
    )
    return run, {stage: put_run_dir(one, str(directory)) for stage, one in configs.items()}


def digest_configs(configs: StageConfigs) -> str:
    """Return the id of a run: digits that its configs alone decide."""
    hashed = {
        stage: {key: value for key, value in config.items() if key not in NOT_HASHED}
        for stage, config in configs.items()
    }
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_ID_DIGITS]


def _finish(
    study: Study, runs: Sequence[PlannedRun], configs: Mapping[str, StageConfigs]
) -> PlannedStudy:
    plan = Plan(
        study=study.name,
        base_label=study.base_arm or runs[0].label,
        runs=runs,
        digest=digest_study(study),
    )
    finished = frozenset(run.run_id for run in unique_runs(runs) if _is_finished(run))
    num_left = len(unique_runs(runs)) - len(finished)
    if study.search is not None:
        num_left = max(study.search.trials - len(finished), 0)
    hours = gpu_hours(study, num_left)
    _check_budget(study, hours, num_left)
    _check_best(study, runs, configs)
    return PlannedStudy(study=study, plan=plan, configs=configs, finished=finished, gpu_hours=hours)


def _check_best(
    study: Study, runs: Sequence[PlannedRun], configs: Mapping[str, StageConfigs]
) -> None:
    """Refuse to test a best checkpoint that training will not keep."""
    if study.test.checkpoint != "best" or "test" not in study.stages:
        return
    for run in runs:
        fit = configs.get(run.run_id, {}).get("fit", {})
        if (fit.get("checkpoint") or {}).get("monitor") is None:
            raise ConfigError(
                f"expected `checkpoint.monitor`, because `test` takes the best checkpoint; "
                f"`{run.label}` sets none. Set it in `settings`, or write `checkpoint: auto`."
            )


def _check_budget(study: Study, hours: float, num_left: int) -> None:
    slurm, budget = study.slurm, study.max_gpu_hours
    if budget is None or slurm is None or hours <= budget:
        return
    raise ConfigError(
        f"expected at most {budget:.6g} GPU-hours (`budget: max_gpu_hours` in `{study.file}`); "
        f"{_count(num_left, 'run')} of {slurm.time} on {slurm.nodes} x {slurm.gpus_per_node} GPUs "
        f"may take {hours:.6g}. Lower `slurm: time`, exclude runs, or raise the budget."
    )


def _is_finished(run: PlannedRun) -> bool:
    state = read_state(run.directory)
    return state is not None and state.status in FINISHED


def _refuse_bad(reasons: Sequence[tuple[RunPoint, str]]) -> None:
    """Raise one error for all variants whose config does not fit, grouped by the reason."""
    # Later stages of a run, and other seeds, mostly repeat what is wrong with the first.
    first_of: dict[str, str] = {}
    for point, reason in reasons:
        if reason:
            first_of.setdefault(point.label, plain_words(_SEE.sub("", reason).rstrip(".")))
    variants: dict[str, list[str]] = {}
    for label, reason in first_of.items():
        variants.setdefault(reason, []).append(label)
    if not variants:
        return
    lines = [f"{_name(labels)}: {reason}" for reason, labels in variants.items()]
    more = f"; and {len(lines) - _MAX_NAMED} more" if len(lines) > _MAX_NAMED else ""
    raise ConfigError(f"expected configs that fit; {'; '.join(lines[:_MAX_NAMED])}{more}")


def _name(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
    return f"`{labels[0]}`{more}"


def digest_study(study: Study) -> str:
    """Return the digest of a study's file and of the config files that it names.

    Raises:
        ConfigError: If one of them cannot be read.
    """
    arms = [path for arm in study.arms for path in arm.configs]
    digest = hashlib.sha256()
    for path in (study.file, *study.base, *arms, *study.test.configs):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"expected the study's files to be there; got `{path}`: {error.strerror}. "
                "Paths are relative to the working directory."
            ) from error
        digest.update(f"{path.name}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def plan_is_stale(study: Study, plan: Plan) -> bool:
    """Tell whether the study, or a config that it names, has changed since a plan was made."""
    return plan.digest != digest_study(study)


def prepare_run(run: PlannedRun, configs: StageConfigs, study: str) -> None:
    """Write what a run directory says of its run; one that has the same stays untouched.

    Args:
        run: The run.
        configs: Its resolved configs, by stage.
        study: Name of the study.

    Raises:
        ConfigError: If the directory belongs to another config.
        StorageError: If it cannot be written.
    """
    found = read_spec(run.directory)
    if found is not None and found.run_id != run.run_id:
        raise ConfigError(
            f"expected `{run.directory}` to be empty or the run of config {run.run_id}; it is that "
            f"of config {found.run_id}. Move it away, or choose another `runs_folder`."
        )
    folder = sweep_folder(run.directory)
    files = {
        config_file(run.directory, stage): dump_yaml(config) for stage, config in configs.items()
    }
    if found is None:
        make_directory(folder)
        # Last, so that a directory that says whose it is has its configs.
        files[folder / SPEC_FILE] = _spec(run, configs, study)
    for path, text in files.items():
        if not _holds(path, text):
            write_text_atomic(path, text)


def _spec(run: PlannedRun, configs: StageConfigs, study: str) -> str:
    trainer = configs["fit"].get("trainer", {}) if "fit" in configs else {}
    steps = trainer.get("max_steps")
    content = {
        "run_id": run.run_id,
        "study": study,
        "label": run.label,
        "stages": list(configs),
        "max_steps": steps if isinstance(steps, int) and steps >= 0 else None,
    }
    return json.dumps(content, indent=1) + "\n"


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, UnicodeDecodeError):
        return False


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
