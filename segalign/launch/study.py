"""What a study is: runs that differ in named arms, in the points of a grid, and in seeds.

It imports no torch, so that commands on studies start at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Stage = Literal["fit", "test"]
SignalName = Literal["USR1", "USR2", "TERM"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A named variant: the base with a few changes.

    Attributes:
        name: What tables call it.
        configs: Config files that are layered over the base.
        settings: Values by dotted key, which win over files.
    """

    name: str
    configs: Sequence[Path] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Level:
    """One value of an axis.

    Attributes:
        label: What tables call it.
        settings: Values by dotted key; several where keys are zipped.
    """

    label: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers between two, for a searcher alone.

    Attributes:
        low: The lowest.
        high: The highest.
        log: Whether they are drawn on a logarithmic scale.
        is_integer: Whether they are integers.
    """

    low: float
    high: float
    log: bool = False
    is_integer: bool = False


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Something that a study varies: a key of ``grid``, or a group of ``zip``.

    Attributes:
        label: What tables call it: the last part of its key, or more of it where another axis is
            called alike.
        keys: Dotted keys that it sets.
        levels: Its values; empty if it has a range.
        range: What a searcher draws from instead.
    """

    label: str
    keys: Sequence[str]
    levels: Sequence[Level] = ()
    range: Range | None = None


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """A number of a finished run.

    Attributes:
        name: As it is logged: ``val/NAME`` or ``train/NAME`` of training, ``test/NAME`` of the
            test's result.
        label: What tables call it.
        mode: ``max`` if larger is better, else ``min``.
        at: Of training: ``last`` value, that of the ``best`` checkpoint's step, or a step.
    """

    name: str
    label: str
    mode: Literal["max", "min"] = "max"
    at: Literal["last", "best"] | int = "last"


@dataclass(frozen=True, kw_only=True)
class TestSettings:
    """How a trained run is tested.

    Attributes:
        configs: Config files that are layered over the run's own.
        settings: Values by dotted key, which win over files.
        checkpoint: ``best`` takes the best checkpoint, ``auto`` the last.
    """

    configs: Sequence[Path] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Literal["best", "auto"] = "auto"


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """What each run asks a cluster for.

    Attributes:
        time: Limit of a run between two preemptions, as ``sbatch`` writes it.
        nodes: Nodes of a run.
        tasks_per_node: Processes on each, which is one for each GPU.
        gpus_per_node: GPUs of each node; 0 asks for none.
        cpus_per_task: Cores of each process; None leaves it to the cluster.
        mem: Memory of each node, as ``sbatch`` writes it; None leaves it to the cluster.
        partition: Partition; None is the cluster's default, as below.
        account: Account.
        qos: Quality of service.
        constraint: Features of nodes.
        signal: What the cluster sends before it takes the nodes away.
        signal_seconds: How long before.
        max_parallel: Runs at the same time; None is as many as the cluster lets.
        runs_per_task: Runs that one task of the array does, one after another.
        max_requeues: How often a run may be taken back into the queue.
        setup: Lines of shell before each run, such as ``module load cuda``.
        options: More options of ``sbatch``, such as ``--exclude=node7``.
    """

    time: str = "24:00:00"
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    signal: SignalName = "USR1"
    signal_seconds: int = 180
    max_parallel: int | None = None
    runs_per_task: int = 1
    max_requeues: int = 20
    setup: Sequence[str] = ()
    options: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How a searcher goes through the space instead of all of its points.

    Attributes:
        kind: Which searcher.
        trials: Runs that it may make; each is one arm, one point and the first seed.
        seed: Of its own draws.
        prune: Whether it stops runs that fall behind at a validation.
        storage: Where it keeps trials; None is a file in the folder of the study.
    """

    kind: Literal["optuna"] = "optuna"
    trials: int = 20
    seed: int = 0
    prune: bool = False
    storage: str | None = None


@dataclass(frozen=True, kw_only=True)
class PlotSettings:
    """What is drawn.

    Attributes:
        curves: Names of values over training; None is every metric of training.
        pareto: Pairs of metrics' names, x and y.
    """

    curves: Sequence[str] | None = None
    pareto: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What the report shows besides tables and plots.

    Attributes:
        prompts: Prompts whose images are shown.
        images_of_each: Images of each arm for each of them.
    """

    prompts: int = 8
    images_of_each: int = 1


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study, as its YAML describes it.

    Every arm is run at every point of the grid and of the zipped groups, with every seed; what
    ``exclude`` matches is left out.

    Attributes:
        name: What it is called; also the folder's name.
        file: Its YAML.
        base: Config files that all runs have, layered in this order.
        settings: Values by dotted key that all runs have.
        arms: Named variants; at least one.
        axes: What is varied besides: first the grid, then the zipped groups.
        seeds: Seeds of each variant, the same for all, so that variants are compared seed by seed.
        exclude: Conditions by axis label, dotted key, ``arm`` or ``seed``, to values or lists of
            values; a run that meets all of one entry is left out.
        metrics: What tables show, in this order; the first is the one that matters.
        base_arm: Label of the variant that others are compared with; None is the first.
        stages: What a run does, in this order.
        test: How it is tested.
        slurm: What it asks a cluster for; None if the study names nothing.
        max_gpu_hours: Budget; None is none.
        search: Searcher; None runs all points.
        plots: What is drawn.
        report: What the report shows.
        folder: Folder of plan, jobs, tables and report.
        runs_folder: Folder of run directories, which studies may share.
    """

    name: str
    file: Path
    base: Sequence[Path]
    settings: Mapping[str, Any] = field(default_factory=dict)
    arms: Sequence[Arm] = (Arm(name="base"),)
    axes: Sequence[Axis] = ()
    seeds: Sequence[int] = (0,)
    exclude: Sequence[Mapping[str, Any]] = ()
    metrics: Sequence[MetricSpec] = ()
    base_arm: str | None = None
    stages: Sequence[Stage] = ("fit",)
    test: TestSettings = field(default_factory=TestSettings)
    slurm: SlurmSettings | None = None
    max_gpu_hours: float | None = None
    search: SearchSettings | None = None
    plots: PlotSettings = field(default_factory=PlotSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    folder: Path
    runs_folder: Path
