"""Numbers of a run: what it logged in training, and what its test found. No torch is needed."""

import csv
import io
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from segalign.errors import DataError
from segalign.evaluation.result import EvaluationResult
from segalign.launch.study import MetricSpec
from segalign.run_directory import read_best

METRICS_FILE: Final = "metrics.csv"
TEST_PREFIX: Final = "test/"
_NO_METRICS: Final = ("step", "epoch")


def read_metric(run_dir: Path, spec: MetricSpec) -> float | None:
    """Read a number of a run.

    Args:
        run_dir: Its directory.
        spec: Which number. ``at`` counts optimizer steps that were done, as checkpoints do.

    Returns:
        The number, NaN if that was logged; None if the run has none at that place.

    Raises:
        DataError: If the result of its test is there, but cannot be read.
    """
    return RunNumbers(run_dir).value(spec)


def read_curve(run_dir: Path, name: str) -> dict[int, float]:
    """Read what a run logged under a name in training, by step, in their order.

    Steps are those of the log, where the first optimizer step is 0. NaN is kept; it is empty if the
    run never logged the name.
    """
    return RunNumbers(run_dir).curve(name)


class RunNumbers:
    """All numbers of a run; each of its files is read once, when it is first needed.

    Args:
        run_dir: Its directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def value(self, spec: MetricSpec) -> float | None:
        """Return a number, see `read_metric`."""
        if spec.name.startswith(TEST_PREFIX):
            return self._test_value(spec.name)
        curve = self.curve(spec.name)
        if not curve:
            return None
        if spec.at == "last":
            return curve[max(curve)]
        step = self._best_step if spec.at == "best" else spec.at
        return None if step is None else _after(curve, step)

    def curve(self, name: str) -> dict[int, float]:
        """Return the values of training by step, see `read_curve`."""
        return dict(sorted(self._training.get(name, {}).items()))

    def names(self) -> list[str]:
        """List all that the run has a number of, with ``test/`` before what its test found.

        Raises:
            DataError: If the result of its test is there, but cannot be read.
        """
        found = [] if self._result is None else [TEST_PREFIX + one for one in self._result.values]
        return list(dict.fromkeys([*self._training, *found, *self._test_log]))

    def protocol(self, name: str) -> dict[str, Any] | None:
        """Return all that a number of the test depends on, as plain data.

        None of other numbers, and of tests without images, which leave no protocol.

        Raises:
            DataError: If the result of the test is there, but cannot be read.
        """
        metric = self._owner(name)
        if metric is None or self._result is None:
            return None
        conditions = self._result.conditions
        general = {field: one for field, one in conditions.items() if field != "metrics"}
        return {**general, metric: conditions["metrics"][metric]}

    def _test_value(self, name: str) -> float | None:
        if self._owner(name) is not None and self._result is not None:
            return self._result.values[name.removeprefix(TEST_PREFIX)]
        logged = self._test_log.get(name)
        return None if logged is None else [*logged.values()][-1]

    def _owner(self, name: str) -> str | None:
        """Name the metric of the test's result that a number belongs to."""
        if not name.startswith(TEST_PREFIX) or self._result is None:
            return None
        own = name.removeprefix(TEST_PREFIX)
        owners = [key for key, one in self._result.metrics.items() if own in one.values]
        return owners[-1] if owners else None  # the one that the result's own values have

    @cached_property
    def _training(self) -> dict[str, dict[int, float]]:
        return _read_log(self.run_dir / "logs" / METRICS_FILE)

    @cached_property
    def _test_log(self) -> dict[str, dict[int, float]]:
        logged = _read_log(self.run_dir / "logs" / "test" / METRICS_FILE)
        return {name: one for name, one in logged.items() if name.startswith(TEST_PREFIX)}

    @cached_property
    def _result(self) -> EvaluationResult | None:
        path = self.run_dir / "evaluation" / "test" / "result.json"
        return EvaluationResult.load(path) if path.exists() else None

    @cached_property
    def _best_step(self) -> int | None:
        best = read_best(self.run_dir)
        return None if best is None else best.step


def _after(curve: Mapping[int, float], step: int) -> float | None:
    """Return what was logged once so many optimizer steps were done.

    Loggers number steps from 0, so that it is in the row before; callbacks that log by themselves
    count the steps that are done.
    """
    return curve.get(step - 1, curve.get(step))


def _read_log(path: Path) -> dict[str, dict[int, float]]:
    """Read a CSV log: values by step, by name; a name's last row comes last.

    A row that a kill has cut off is left out, as are rows and cells that hold no numbers.
    """
    try:
        # Not by lines as text has them: a file that ends within one is cut off there.
        text = path.read_bytes().decode("utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise DataError(
            f"expected the metrics of a run in `{path}`; it cannot be read: {error.strerror}; "
            "check its permissions"
        ) from error
    whole = text[: text.rfind("\n") + 1]
    try:
        header, *rows = [*csv.reader(io.StringIO(whole, newline=""))] or [[]]
    except csv.Error as error:
        raise DataError(
            f"expected the metrics of a run in `{path}`; it is no CSV: {error}; "
            "repeat the run, or bring the file back"
        ) from error
    return _columns(header, rows)


def _columns(header: list[str], rows: list[list[str]]) -> dict[str, dict[int, float]]:
    columns: dict[str, dict[int, float]] = {}
    names = [(place, name) for place, name in enumerate(header) if name not in _NO_METRICS]
    place_of_step = header.index("step") if "step" in header else None
    for row in rows:
        if place_of_step is None or len(row) != len(header):
            continue
        step = _number(row[place_of_step])
        if step is None or not math.isfinite(step):
            continue
        for place, name in names:
            if row[place] and (value := _number(row[place])) is not None:
                column = columns.setdefault(name, {})
                column.pop(int(step), None)
                column[int(step)] = value
    return columns


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
