"""What the evaluations of a run have found, step by step."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segalign.atomic import make_directory, write_text_atomic


class History:
    """A JSONL file with a line for each evaluated step: ``{"step": ..., "values": {...}}``.

    Args:
        path: The file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[int, dict[str, float]]:
        """Return the values by step, in the order of steps; lines that are no records are left."""
        found: dict[int, dict[str, float]] = {}
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        for line in text.splitlines():
            record = _parse(line)
            if record is not None:
                values = record["values"].items()
                found[record["step"]] = {n: math.nan if v is None else v for n, v in values}
        return dict(sorted(found.items()))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a step, and forget later ones: those of an attempt that was gone back on."""
        kept = {old: one for old, one in self.read().items() if old < step} | {step: dict(values)}
        lines = [
            json.dumps({"step": each, "values": {n: _plain(v) for n, v in one.items()}})
            for each, one in kept.items()
        ]
        make_directory(self.path.parent)
        write_text_atomic(self.path, "".join(f"{line}\n" for line in lines))


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_whole = isinstance(record, dict) and isinstance(record.get("values"), dict)
    return record if is_whole and isinstance(record.get("step"), int) else None


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
