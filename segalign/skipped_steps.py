"""Optimizer steps that are left out because a number was not finite: which, why, and how many."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch import nn

from segalign.atomic import make_directory, write_text_atomic
from segalign.json_text import parse_json
from segalign.ranks import gather_objects
from segalign.sharded_tensors import local

LOG_NAME: Final = "skipped_steps.jsonl"
_MAX_NAMED = 3


@dataclass(frozen=True)
class SkippedStep:
    """An optimizer step that changed nothing, on all ranks alike.

    Attributes:
        step: Optimizer steps before it.
        reason: What was not finite, in words.
        sample_ids: Whose losses were not finite, over all ranks; if all were finite and their
            gradient was not, all samples of the step.
    """

    step: int
    reason: str
    sample_ids: tuple[int, ...]

    def __str__(self) -> str:
        """Say it in words, with the first few samples."""
        samples = _first(list(map(str, self.sample_ids))) or "none"
        return f"step {self.step}: {self.reason}; samples {samples}; no weight was changed"

    def record(self) -> dict[str, Any]:
        """Return what is logged of it, as JSON has it."""
        return {"step": self.step, "reason": self.reason, "sample_ids": list(self.sample_ids)}


@runtime_checkable
class SkipsSteps(Protocol):
    """A module that says of its last optimizer step whether it changed anything."""

    skipped: SkippedStep | None
    is_left_out: bool


def skipped_step(module: object) -> SkippedStep | None:
    """Tell whether a module's last optimizer step was skipped; the same on all ranks."""
    return module.skipped if isinstance(module, SkipsSteps) else None


def is_left_out(module: object) -> bool:
    """Tell whether a module's last optimizer step changed nothing, as a skipped one; likewise.

    Float16's loss scaler leaves out steps as well: a scale that is too large is no fault.
    """
    return isinstance(module, SkipsSteps) and module.is_left_out


# What ranks find


@dataclass(frozen=True)
class RankFinding:
    """What one rank knows of a step whose losses, or gradient, are not finite.

    Attributes:
        sample_ids: Samples of this rank whose losses are not finite.
        all_ids: All samples of this rank in the step.
        detail: What else is known, in words; may be empty.
        gradients: Weights whose gradient is not finite, by name.
    """

    sample_ids: Sequence[int]
    all_ids: Sequence[int]
    detail: str
    gradients: Sequence[str]


def agree_on_skip(step: int, own: RankFinding) -> SkippedStep:
    """Put together what all ranks know of a bad step; a collective.

    Args:
        step: Optimizer steps before it.
        own: What this rank knows.

    Returns:
        The step, the same on all ranks.
    """
    found: list[RankFinding] = gather_objects(own)
    bad_ids = [one for finding in found for one in finding.sample_ids]
    if bad_ids:
        reason, ids = f"the losses of {len(bad_ids)} samples are not finite", bad_ids
    else:
        names = list(dict.fromkeys(name for finding in found for name in finding.gradients))
        reason = "the losses are finite, and their gradient is not"
        if names:
            reason = f"{reason}: {_first([f'`{name}`' for name in names])}"
        ids = [one for finding in found for one in finding.all_ids]
    details = [
        finding.detail if len(found) == 1 else f"rank {rank}: {finding.detail}"
        for rank, finding in enumerate(found)
        if finding.detail
    ]
    if details:
        reason = f"{reason} ({_first(details, '; ')})"
    return SkippedStep(step, reason, tuple(ids))


def bad_gradients(trained: Mapping[str, nn.Parameter]) -> list[str]:
    """Name the weights whose gradient, or this rank's shard of it, is not finite."""
    with torch.no_grad():
        return [
            name
            for name, weight in trained.items()
            if weight.grad is not None and not local(weight.grad).isfinite().all()
        ]


def drop_gradients(trained: Mapping[str, nn.Parameter], *, are_scaled: bool = False) -> None:
    """Take away all gradients: an optimizer changes neither weights without one nor their state.

    Gradients of zero would not do: moments would decay, and weights move by their momentum.

    Args:
        trained: The trained weights.
        are_scaled: The optimizer itself takes the scale of float16 from the gradients, and leaves
            out a step where they are infinite; it wants to see them so.
    """
    for weight in trained.values():
        if are_scaled and weight.grad is not None:
            weight.grad.fill_(torch.inf)
        else:
            weight.grad = None


def _first(names: Sequence[str], separator: str = ", ") -> str:
    return separator.join([*names[:_MAX_NAMED], *(["..."] if len(names) > _MAX_NAMED else [])])


# How many there are


class SkipCounter:
    """Counts skipped steps in a row, and among the last ones.

    Args:
        max_in_a_row: So many in a row are too many.
        max_share: Largest share of ``window`` steps that may be skipped; of a run that has not
            taken so many yet, as many may be as of one that has.
        window: How many steps are looked back on.

    Attributes:
        total: All that were skipped since the start of the run.
        in_a_row: Those since the last good one.
    """

    def __init__(self, max_in_a_row: int, max_share: float, window: int) -> None:
        self.max_in_a_row = max_in_a_row
        self.max_share = max_share
        self.window = window
        self.total = 0
        self.in_a_row = 0
        self._recent: list[int] = []

    def add(self, step: int, *, is_skipped: bool) -> None:
        """Count a step.

        Args:
            step: Optimizer steps before it.
            is_skipped: Whether it was skipped.
        """
        self._recent = [one for one in self._recent if one > step - self.window]
        self.in_a_row = self.in_a_row + 1 if is_skipped else 0
        if is_skipped:
            self.total += 1
            self._recent.append(step)

    def too_many(self) -> str | None:
        """Say which bound is passed, in words; None if none is."""
        if self.in_a_row >= self.max_in_a_row:
            return f"{self.in_a_row} skipped steps in a row"
        if len(self._recent) > self.max_share * self.window:
            return f"{len(self._recent)} skipped steps among the last {self.window}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"total": self.total, "in_a_row": self.in_a_row, "recent": list(self._recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over saved counts."""
        self.total = int(state["total"])
        self.in_a_row = int(state["in_a_row"])
        self._recent = [int(step) for step in state["recent"]]


# Their log


def forget_from(path: Path, step: int) -> None:
    """Take out of a log the steps that a resumed run takes once more.

    Args:
        path: The log; it may be missing.
        step: The first of them.

    Raises:
        StorageError: If it cannot be written.
    """
    lines = _read(path)
    kept = {at: line for at, line in lines.items() if at < step}
    if len(kept) != len(lines):
        _write(path, kept)


def append(path: Path, skipped: SkippedStep) -> None:
    """Add a step to a log, one line of JSON for each.

    Raises:
        StorageError: If it cannot be written.
    """
    make_directory(path.parent)
    _write(path, {**_read(path), skipped.step: json.dumps(skipped.record())})


def _read(path: Path) -> dict[int, str]:
    """Read lines by their step; those that are damaged are left out."""
    if not path.exists():
        return {}
    found: dict[int, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found[int(parse_json(line)["step"])] = line
        except (ValueError, TypeError, KeyError):
            continue
    return found


def _write(path: Path, lines: Mapping[int, str]) -> None:
    write_text_atomic(path, "".join(f"{line}\n" for line in lines.values()))
