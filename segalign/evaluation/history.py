"""What the evaluations of a run have found, step by step."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segalign.atomic import make_directory, write_text_atomic
from segalign.json_text import parse_json


class StepRecords:
    """A JSONL file with a record for each evaluated step: ``{"step": ..., FIELD: {...}}``.

    Args:
        path: The file; it need not be there.
        field: Name of what is recorded.
    """

    def __init__(self, path: Path, field: str) -> None:
        self.path = path
        self.field = field

    def read(self) -> dict[int, dict[str, Any]]:
        """Return what was recorded by step, in order; lines that are no records are passed over."""
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        records = (self._parse(line) for line in text.splitlines())
        found = {one["step"]: one[self.field] for one in records if one is not None}
        return dict(sorted(found.items()))

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Add a step, and forget later ones: those of an attempt that was gone back on."""
        kept = {old: one for old, one in self.read().items() if old < step} | {step: dict(record)}
        lines = [
            json.dumps({"step": each, self.field: one}, allow_nan=False)
            for each, one in kept.items()
        ]
        make_directory(self.path.parent)
        write_text_atomic(self.path, "".join(f"{line}\n" for line in lines))

    def _parse(self, line: str) -> dict[str, Any] | None:
        try:
            record = parse_json(line)
        except ValueError:
            return None
        is_whole = isinstance(record, dict) and isinstance(record.get(self.field), dict)
        return record if is_whole and isinstance(record.get("step"), int) else None


class History:
    """Values of the evaluated steps of a run.

    Args:
        path: A JSONL file with lines ``{"step": ..., "values": {...}}``; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records = StepRecords(path, "values")

    def read(self) -> dict[int, dict[str, float]]:
        """Return the values by step, in the order of steps; NaN where one is not finite."""
        return {
            step: {name: math.nan if value is None else value for name, value in values.items()}
            for step, values in self._records.read().items()
        }

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a step, and forget later ones: those of an attempt that was gone back on."""
        plain = {name: float(v) if math.isfinite(v) else None for name, v in values.items()}
        self._records.write(step, plain)
