"""The plan of a study: its runs, each with an id that its config alone decides."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from segalign.atomic import make_directory, write_text_atomic
from segalign.errors import DataError
from segalign.json_text import parse_json
from segalign.launch.study import Stage

PLAN_FILE: Final = "plan.json"
_FORMAT: Final = 1

# Turns a stage and its command line into its resolved config, plain data, through the parser that
# the run itself uses; a ConfigError says what is wrong.
ResolveConfig = Callable[[Stage, Sequence[str]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        run_id: Digest of its configs, 12 hexadecimal digits; also its directory's name.
        label: Of its variant, such as ``drtune, num_train_steps=3``: all but the seed.
        arm: Name of its arm.
        levels: Labels of its levels, by the labels of axes.
        seed: Its seed.
        directory: Its run directory.
        trial: Number of a searcher's trial; None of others.
    """

    run_id: str
    label: str
    arm: str
    levels: Mapping[str, str]
    seed: int
    directory: Path
    trial: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All runs of a study.

    Attributes:
        study: The study's name.
        base_label: Label of the variant that others are compared with.
        runs: In the order of arms, points and seeds.
        digest: Of the study's file and of all config files that it names, to see later changes.
    """

    study: str
    base_label: str
    runs: Sequence[PlannedRun]
    digest: str = ""

    @property
    def labels(self) -> list[str]:
        """Labels of variants, in their order."""
        return list(dict.fromkeys(run.label for run in self.runs))

    def of(self, label: str) -> list[PlannedRun]:
        """Return the runs of a variant, by seed."""
        return [run for run in self.runs if run.label == label]

    def save(self, folder: Path) -> None:
        """Write ``plan.json``, whole or not at all.

        Raises:
            StorageError: If it cannot be written.
        """
        make_directory(folder)
        content = {"format": _FORMAT, **asdict(self)}
        for run in content["runs"]:
            run["directory"] = str(run["directory"])
        write_text_atomic(folder / PLAN_FILE, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        """Read ``plan.json``.

        Raises:
            DataError: If there is none, or it cannot be read.
        """
        path = folder / PLAN_FILE
        try:
            content = parse_json(path.read_bytes())
            if content.pop("format") != _FORMAT:
                raise ValueError("another format")
            runs = [_run(one) for one in content.pop("runs")]
            return cls(**content, runs=runs)
        except FileNotFoundError as error:
            raise DataError(
                f"expected the plan of a study that has been started in `{folder}`; got none. "
                "Start it with `python main.py sweep run STUDY`."
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"expected the plan of a study in `{path}`; it cannot be read: {error}. "
                "`python main.py sweep run STUDY` writes it anew; finished runs are not repeated."
            ) from error


def unique_runs(runs: Iterable[PlannedRun]) -> list[PlannedRun]:
    """Leave out runs that are the same as earlier ones: variants may coincide."""
    return list({run.run_id: run for run in reversed(list(runs))}.values())[::-1]


def _run(content: Mapping[str, Any]) -> PlannedRun:
    return PlannedRun(**{**content, "directory": Path(content["directory"])})
