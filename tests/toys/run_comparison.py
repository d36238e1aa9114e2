"""What two runs must share if one of them was stopped and resumed."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segalign.evaluation.history import History
from segalign.run_directory import newest_checkpoint, read_best
from segalign.run_format import load_checkpoint

TENSORS = ("model", "ema", "optimizer", "extra")
# Of a validation that was done before a resume, Lightning counts the batches twice; the next one
# begins anew.
LAST_VALIDATION = "val_loop.batch_progress/current"
# Speeds and what follows from them.
TIMED = ("seconds", "per_second", "mfu", "speed")


def losses(run_dir: Path) -> dict[int, str]:
    """Read the losses of all batches; a batch that was repeated must have repeated its loss."""
    records: dict[int, str] = {}
    for line in (run_dir / "losses.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert records.setdefault(record["batch"], record["loss"]) == record["loss"]
    return records


def assert_same_training(broken: Path, straight: Path) -> None:
    """Compare losses, and the bytes of the last weights, their average and the optimizer."""
    assert losses(broken) == losses(straight)
    for name in ("model", "ema", "optimizer"):
        one, other = (
            (newest_checkpoint(run) / f"{name}.safetensors").read_bytes()
            for run in (broken, straight)
        )
        assert one == other, name


def lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file; a kill may have cut its last line."""
    return [json.loads(line) for line in path.read_bytes().splitlines() if line.endswith(b"}")]


def served(run_dir: Path, rank: int = 0) -> dict[tuple[int, int], dict[str, Any]]:
    """Read what each micro-batch served and lost; those that were repeated must agree."""
    records: dict[tuple[int, int], dict[str, Any]] = {}
    for record in lines(run_dir / f"steps-{rank}.jsonl"):
        if "began_at" not in record:
            place = record["step"], record["slot"]
            assert records.setdefault(place, record) == record, place
    return records


def lost_steps(run_dir: Path) -> list[int]:
    """Count the optimizer steps that each attempt but the first had to repeat."""
    lost, num_done = [], 0
    for record in lines(run_dir / "steps-0.jsonl"):
        if "began_at" in record:
            lost.append(num_done - record["began_at"])
        else:
            num_done = record["step"] + 1
    return lost[1:]


def logged(run_dir: Path) -> set[tuple[tuple[str, str], ...]]:
    """Read the rows of ``metrics.csv``, without speeds; a row that was repeated counts once."""
    with (run_dir / "logs" / "metrics.csv").open(newline="") as rows:
        return {
            tuple(
                (name, value)
                for name, value in sorted(row.items())
                if value and not any(word in name for word in TIMED)
            )
            for row in csv.DictReader(rows)
        }


def assert_same_run(broken: Path, straight: Path) -> None:
    """Compare all that two runs have served, logged, evaluated and stored, bit by bit."""
    assert served(broken) == served(straight)
    missing, added = logged(straight) - logged(broken), logged(broken) - logged(straight)
    assert not missing | added, {"missing": missing, "added": added}
    one, other = (
        History(run / "evaluation" / "history.jsonl").read() for run in (broken, straight)
    )
    assert_same_values(one, other, "history.jsonl")
    assert_same_checkpoints(newest_checkpoint(broken), newest_checkpoint(straight))
    assert read_best(broken) == read_best(straight)
    checkpoints = (broken / "checkpoints").iterdir()
    assert not [path.name for path in checkpoints if path.name.startswith(".")]


def assert_same_values(one: dict, other: dict, where: str) -> None:
    differing = [
        (key, one.get(key), other.get(key))
        for key in sorted({*one, *other})
        if repr(one.get(key)) != repr(other.get(key))
    ]
    assert not differing, (where, differing[:5])


def assert_same_checkpoints(one: Path, other: Path) -> None:
    """Compare the bytes of the tensors, and all that is no tensor but the config."""
    assert one.name == other.name
    for name in TENSORS:
        files = [checkpoint / f"{name}.safetensors" for checkpoint in (one, other)]
        assert files[0].exists() == files[1].exists(), name
        assert not files[0].exists() or files[0].read_bytes() == files[1].read_bytes(), name
    trees = [dict(leaves(load_checkpoint(path))) for path in (one, other)]
    assert_same_values(*trees, "checkpoint")


def leaves(tree: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a checkpoint by their places."""
    if place.startswith("/run_config") or place.endswith(LAST_VALIDATION):
        return
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from leaves(value, f"{place}/{key}")
    else:
        yield place, tree
