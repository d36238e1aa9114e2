"""Read the YAML file of a study."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from segalign.launch.gpu_hours import slurm_hours
from segalign.launch.points import UNNAMED, expand
from segalign.launch.study import (
    Arm,
    Axis,
    ReportSettings,
    SearchSettings,
    SlurmSettings,
    Stage,
    Study,
    TestSettings,
)
from segalign.launch.study_axes import read_axes
from segalign.launch.study_metrics import read_metrics, read_plots
from segalign.launch.study_place import (
    Place,
    as_dataclass,
    as_files,
    as_list,
    as_mapping,
    as_settings,
    brief,
    check_files,
    check_keys,
    near,
)
from segalign.launch.yaml_dialect import read_yaml

_KEYS: Final = (
    "name",
    "base",
    "settings",
    "arms",
    "grid",
    "zip",
    "seeds",
    "exclude",
    "stages",
    "test",
    "metrics",
    "base_arm",
    "slurm",
    "budget",
    "search",
    "plots",
    "report",
    "folder",
    "runs_folder",
)
_NAME: Final = re.compile(r"[\w.+-]+")
_MAX_NAME_BYTES: Final = 200
_SWEEPS: Final = Path("runs/sweeps")
_STAGES: Final = (["fit"], ["fit", "test"])


def load_study(
    path: Path, *, base: Sequence[Path] | None = None, folder: Path | None = None
) -> Study:
    """Read a study; its folders become absolute, so that its plan holds from anywhere.

    Args:
        path: Its YAML file.
        base: Config files instead of those that it names.
        folder: Folder of plan and results instead of the one that it names.

    Raises:
        ConfigError: If the file cannot be read, or something in it does not fit.
    """
    place = Place(path)
    content = as_mapping(read_yaml(path, "the file of a study"), place, "{base: [configs/a.yaml]}")
    check_keys(content, _KEYS, place)
    name = _read_name(content.get("name", path.stem), place)
    search = _read_search(content.get("search"), place)
    axes = read_axes(content.get("grid"), content.get("zip"), place)
    stages = _read_stages(content, place)
    metrics = read_metrics(content, stages, place)
    study = Study(
        name=name,
        file=path,
        base=_read_base(content, base, place),
        settings=as_settings(content.get("settings"), place.of("`settings`")),
        arms=_read_arms(content, axes, place),
        axes=axes,
        seeds=_read_seeds(content.get("seeds", [0]), place),
        exclude=_read_exclude(content.get("exclude"), place),
        metrics=metrics,
        base_arm=content.get("base_arm"),
        stages=stages,
        test=_read_test(content.get("test"), place),
        slurm=_read_slurm(content, place),
        max_gpu_hours=_read_budget(content, place),
        search=search,
        plots=read_plots(content.get("plots", {}), metrics, place),
        report=_read_report(content.get("report", {}), place),
        folder=(folder or _read_path(content, "folder", _SWEEPS / name, place)).absolute(),
        runs_folder=_read_path(content, "runs_folder", _SWEEPS / "runs", place).absolute(),
    )
    _check_ranges(study, place)
    _check_base_arm(study, place)
    return study


def _read_name(name: Any, place: Place) -> str:
    if not isinstance(name, str) or not _is_folder_name(name):
        advice = "use letters, digits and `-_.+`, because a folder is called so"
        raise place.of("`name`").error("a name", brief(name), advice)
    return name


def _is_folder_name(name: str) -> bool:
    """Tell whether a folder can be called so; dots alone would lead to another one."""
    is_short = len(name.encode(errors="replace")) <= _MAX_NAME_BYTES
    return is_short and bool(name.strip(".")) and bool(_NAME.fullmatch(name))


def _read_base(
    content: Mapping[str, Any], given: Sequence[Path] | None, place: Place
) -> tuple[Path, ...]:
    if given:
        return check_files(given, Place(place.file, "`--base`"))
    if not content.get("base"):
        raise place.error("`base`, the configs of all runs", "none", "write `base: [FILE]`")
    return as_files(content["base"], place.of("`base`"))


def _read_arms(content: Mapping[str, Any], axes: Sequence[Axis], place: Place) -> tuple[Arm, ...]:
    if "arms" not in content:
        return (UNNAMED,)
    here = place.of("`arms`")
    named = as_mapping(content["arms"], here, "{plain: {}, other: {model.init_args.omega: 0}}")
    if not named:
        raise here.error("named arms", "none", "add some, or leave out `arms`")
    return tuple(_read_arm(name, arm, axes, place) for name, arm in named.items())


def _read_arm(name: str, content: Any, axes: Sequence[Axis], place: Place) -> Arm:
    here = place.of(f"arm `{name}`")
    content = as_mapping({} if content is None else content, here, "{trainer.max_steps: 40}")
    settings = {key: value for key, value in content.items() if key != "configs"}
    for axis in axes:
        for key in axis.keys:
            if key in settings:
                advice = f"the axis `{axis.label}` sets it in all arms; remove it from one of them"
                raise here.error("settings that no axis varies", f"`{key}`", advice)
    return Arm(
        name=name,
        configs=as_files(content.get("configs", []), here.of("`configs`")),
        settings=as_settings(settings, here),
    )


def _read_seeds(seeds: Any, place: Place) -> tuple[int, ...]:
    here = place.of("`seeds`")
    for seed in as_list(seeds, here, "[0, 1, 2]"):
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise here.error("integers from 0 to 4294967295", brief(seed), "correct it")
        if seeds.count(seed) > 1:
            raise here.error("each seed once", f"{seed} twice", "remove one of them")
    return tuple(seeds)


def _read_exclude(entries: Any, place: Place) -> tuple[Mapping[str, Any], ...]:
    if entries is None:
        return ()
    here, example = place.of("`exclude`"), "{arm: plain, seed: [1, 2]}"
    found = [as_mapping(entry, here, example) for entry in as_list(entries, here, f"[{example}]")]
    if not all(found):
        raise here.error("conditions in each entry", "none", "an empty one would match all runs")
    return tuple(found)


def _read_stages(content: Mapping[str, Any], place: Place) -> tuple[Stage, ...]:
    stages = content.get("stages", ["fit"])
    if stages not in _STAGES:
        raise place.of("`stages`").error("`[fit]` or `[fit, test]`", brief(stages), "correct it")
    if "test" in content and "test" not in stages:
        advice = "write `stages: [fit, test]`, or remove `test`"
        raise place.error("the stage `test`, because `test:` says how", brief(stages), advice)
    return tuple(stages)


def _read_test(content: Any, place: Place) -> TestSettings:
    if content is None:
        return TestSettings()
    here = place.of("`test`")
    content = dict(as_mapping(content, here, "{checkpoint: best}"))
    configs = as_files(content.pop("configs", []), here.of("`configs`"))
    settings = as_settings(content.pop("settings", None), here.of("`settings`"))
    check_keys(content, ("configs", "settings", "checkpoint"), here)
    rest = as_dataclass(TestSettings, content, here, "{checkpoint: best}")
    return TestSettings(configs=configs, settings=settings, checkpoint=rest.checkpoint)


def _read_slurm(content: Mapping[str, Any], place: Place) -> SlurmSettings | None:
    if content.get("slurm") is None:
        return None
    here = place.of("`slurm`")
    slurm = as_dataclass(SlurmSettings, content["slurm"], here, '{time: "08:00:00"}')
    smallest = {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0, "cpus_per_task": 1}
    smallest |= {"signal_seconds": 1, "max_parallel": 1, "runs_per_task": 1, "max_requeues": 0}
    for key, least in smallest.items():
        value = getattr(slurm, key)
        if value is not None and value < least:
            raise here.error(f"`{key}` of at least {least}", str(value), "raise it")
    if slurm_hours(slurm.time) is None:
        advice = "write HOURS:MINUTES:SECONDS or DAYS-HOURS"
        raise here.error("`time` as sbatch writes it", brief(slurm.time), advice)
    return slurm


def _read_budget(content: Mapping[str, Any], place: Place) -> float | None:
    if content.get("budget") is None:
        return None
    here = place.of("`budget`")
    budget = as_mapping(content["budget"], here, "{max_gpu_hours: 400}")
    check_keys(budget, ("max_gpu_hours",), here)
    hours = budget.get("max_gpu_hours")
    if isinstance(hours, bool) or not isinstance(hours, int | float) or not hours >= 0:
        raise here.error("`max_gpu_hours`, a number from 0 on", brief(hours), "correct it")
    slurm = content.get("slurm")
    if not (isinstance(slurm, Mapping) and slurm.get("gpus_per_node")):
        advice = "a budget is counted from them"
        raise here.error("`slurm` with `time` and `gpus_per_node`", "none", advice)
    return float(hours)


def _read_search(content: Any, place: Place) -> SearchSettings | None:
    if content is None:
        return None
    given = {"kind": content} if isinstance(content, str) else content
    here = place.of("`search`")
    search = as_dataclass(SearchSettings, given, here, "{kind: optuna, trials: 20}")
    if search.trials < 1:
        raise here.error("`trials` of at least 1", str(search.trials), "raise it")
    return search


def _read_report(content: Any, place: Place) -> ReportSettings:
    here = place.of("`report`")
    report = as_dataclass(ReportSettings, content, here, "{prompts: 8}")
    if report.prompts < 0 or report.images_of_each < 1:
        advice = "correct it"
        raise here.error("`prompts` from 0 on, `images_of_each` from 1", brief(content), advice)
    return report


def _read_path(content: Mapping[str, Any], key: str, default: Path, place: Place) -> Path:
    found = content.get(key)
    if found is not None and (not isinstance(found, str) or not found):
        raise place.of(f"`{key}`").error("a path", brief(found), "correct it")
    return default if found is None else Path(found)


def _check_ranges(study: Study, place: Place) -> None:
    ranged = next((axis for axis in study.axes if axis.range is not None), None)
    if ranged is not None and study.search is None:
        advice = "add `search: optuna`, or list values"
        raise place.of(f"axis `{ranged.label}`").error("values to run", "a range", advice)


def _check_base_arm(study: Study, place: Place) -> None:
    """Check exclusions, and that the variant which others are compared with is run."""
    labels = list(dict.fromkeys(point.label for point in expand(study)))
    is_open = any(axis.range is not None for axis in study.axes)
    if study.base_arm is None or is_open or study.base_arm in labels:
        return
    raise place.of("`base_arm`").error(
        "the label of a variant", brief(study.base_arm), near(str(study.base_arm), labels)
    )
