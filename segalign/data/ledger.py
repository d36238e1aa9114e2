"""Accounts of the samples: manifest = earlier + delivered + quarantined[reason] + not reached.

``delivered`` counts where a step consumes a sample, not where a worker read it.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from segalign.atomic import write_bytes_atomic
from segalign.data.faults import FaultRecord
from segalign.errors import DataError
from segalign.json_text import parse_json
from segalign.ranks import gather_objects

REPORT_NAME: Final = "data_report.json"
_MAX_RECORDS: Final = 1000
_MAX_SHOWN: Final = 200
T = TypeVar("T")


@dataclass
class EpochAccount:
    """Counts of one epoch.

    Attributes:
        delivered: Valid samples that a step consumed.
        quarantined: Samples whose slot came without content, by reason.
        id_sum: Sum of the sample ids of both kinds; tells a doubled sample from a lost one.
        shards: The quarantined samples once more, by shard.
    """

    delivered: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    id_sum: int = 0
    shards: Counter[str] = field(default_factory=Counter)

    @property
    def reached(self) -> int:
        """Samples delivered or quarantined."""
        return self.delivered + self.quarantined.total()

    def add(self, other: "EpochAccount") -> None:
        """Add another rank's counts of the same epoch."""
        self.delivered += other.delivered
        self.quarantined.update(other.quarantined)
        self.id_sum += other.id_sum
        self.shards.update(other.shards)

    def remove(self, other: "EpochAccount") -> None:
        """Take away counts that were added."""
        self.delivered -= other.delivered
        self.quarantined -= other.quarantined
        self.id_sum -= other.id_sum
        self.shards -= other.shards


class Ledger:
    """Count what steps consume, per epoch, on one rank; ledgers of all ranks can be merged.

    Args:
        num_samples: Samples of the manifest; None for a stream that has none.
        first_position: Positions of the sequence that earlier attempts of the run have consumed
            without leaving their counts.

    Attributes:
        epochs: Counts by epoch.
        records: The first thousand faults, in the order of the sequence.
        delivered: Valid samples consumed in all epochs.
        num_quarantined: Samples that came without content in all epochs.
    """

    def __init__(self, num_samples: int | None, *, first_position: int = 0) -> None:
        self.num_samples = num_samples
        self.first_position = first_position
        self.epochs: dict[int, EpochAccount] = {}
        self.records: list[FaultRecord] = []
        self.delivered = 0
        self.num_quarantined = 0

    @property
    def quarantined(self) -> Counter[str]:
        """Samples that came without content in all epochs, by reason."""
        total: Counter[str] = Counter()
        for account in self.epochs.values():
            total.update(account.quarantined)
        return total

    @property
    def end_position(self) -> int:
        """First position of the sequence that no step has consumed."""
        return self.first_position + self.delivered + self.num_quarantined

    def consume(
        self,
        sample_ids: Sequence[int],
        epochs: Sequence[int],
        valid: Sequence[bool],
        faults: Sequence[FaultRecord],
    ) -> None:
        """Count the rows of one batch, each ``(B,)``; rows without sample and fault are padding."""
        faulty = {fault["row"]: fault for fault in faults}
        for row, (sample_id, epoch, is_valid) in enumerate(
            zip(sample_ids, epochs, valid, strict=True)
        ):
            if not is_valid and row not in faulty:
                continue
            account = self.epochs.setdefault(epoch, EpochAccount())
            account.id_sum += sample_id
            if is_valid:
                account.delivered += 1
                self.delivered += 1
            else:
                account.quarantined[faulty[row]["reason"]] += 1
                account.shards[faulty[row]["shard"]] += 1
                self.num_quarantined += 1
        self.records = _first_records(self.records, faults)

    def check_identity(self) -> None:
        """See that the rows of all ranks are the positions that the sequence says, each once.

        Raises:
            DataError: If the accounts of an epoch do not add up.
        """
        if self.num_samples is None:
            return
        end = self.end_position
        for epoch, account in self.epochs.items():
            expected = self._positions_in(epoch, self.first_position, end)
            doubled = (
                account.reached == expected == self.num_samples
                and account.id_sum != self.num_samples * (self.num_samples - 1) // 2
            )
            if account.reached != expected or doubled:
                raise DataError(
                    f"epoch {epoch} must account for {expected} samples, each once; got "
                    f"{account.reached}{', some of them twice' if doubled else ''}; do not change "
                    f"shards during a run, and report this if you did not"
                )

    def merged(self, others: Iterable["Ledger"]) -> "Ledger":
        """Return the sum of this ledger and those of the other ranks."""
        total = Ledger(self.num_samples, first_position=self.first_position)
        for ledger in (self, *others):
            for epoch, account in ledger.epochs.items():
                total.epochs.setdefault(epoch, EpochAccount()).add(account)
            total.delivered += ledger.delivered
            total.num_quarantined += ledger.num_quarantined
            total.records = _first_records(total.records, ledger.records)
        return total

    def without(self, some: "Ledger") -> "Ledger":
        """Return this ledger less some of its own counts, the last of the sequence."""
        rest = self.merged([])
        rest.delivered -= some.delivered
        rest.num_quarantined -= some.num_quarantined
        for epoch, account in some.epochs.items():
            rest.epochs[epoch].remove(account)
            if not rest.epochs[epoch].reached:
                del rest.epochs[epoch]
        left_out = {record["position"] for record in some.records}
        rest.records = [one for one in rest.records if one["position"] not in left_out]
        return rest

    # What is kept of it

    def report(self) -> dict[str, Any]:
        """Return the accounts as JSON-able values."""
        return {
            "manifest": self.num_samples,
            "first_position": self.first_position,
            "delivered": self.delivered,
            "quarantined": _sorted(self.quarantined),
            "epochs": [self._report_epoch(epoch) for epoch in sorted(self.epochs)],
            "faults": self.records,
            "faults_left_out": self.num_quarantined - len(self.records),
        }

    def _report_epoch(self, epoch: int) -> dict[str, Any]:
        account = self.epochs[epoch]
        counts: dict[str, Any] = {
            "epoch": epoch,
            "delivered": account.delivered,
            "quarantined": _sorted(account.quarantined),
            "quarantined_by_shard": _sorted(account.shards),
        }
        if self.num_samples is None:
            return counts
        earlier = self._positions_in(epoch, 0, self.first_position)
        counts["manifest"] = self.num_samples
        counts["earlier"] = earlier
        counts["not_reached"] = self.num_samples - earlier - account.reached
        return counts

    def _positions_in(self, epoch: int, start: int, end: int) -> int:
        assert self.num_samples is not None
        first = epoch * self.num_samples
        return max(0, min(end, first + self.num_samples) - max(start, first))

    def state(self) -> dict[str, Any]:
        """Return plain values to go on counting from; see ``from_state``."""
        return {
            "num_samples": self.num_samples,
            "first_position": self.first_position,
            "epochs": [
                [epoch, a.delivered, a.id_sum, _sorted(a.quarantined), _sorted(a.shards)]
                for epoch, a in sorted(self.epochs.items())
            ],
            "faults": [{**record} for record in self.records],
        }

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> "Ledger":
        """Return the ledger that ``state`` was taken of."""
        ledger = Ledger(state["num_samples"], first_position=state["first_position"])
        for epoch, delivered, id_sum, quarantined, shards in state["epochs"]:
            account = EpochAccount(delivered, Counter(quarantined), id_sum, Counter(shards))
            ledger.epochs[epoch] = account
            ledger.delivered += delivered
            ledger.num_quarantined += account.quarantined.total()
        ledger.records = list(state["faults"])
        return ledger


def _first_records(known: list[FaultRecord], more: Sequence[FaultRecord]) -> list[FaultRecord]:
    """Return the first of both in the order of the sequence, whichever rank has met them."""
    if not more:
        return known
    return sorted([*known, *more], key=lambda record: record["position"])[:_MAX_RECORDS]


def _sorted(counts: Mapping[str, T]) -> dict[str, T]:
    """Order counts by name, so that equal accounts are equal files."""
    return dict(sorted(counts.items()))


def gather_stages(stages: dict[str, Ledger]) -> dict[str, Ledger]:
    """Merge the ledgers of all ranks, stage by stage; every rank must call it."""
    ranks = gather_objects(stages)
    return {
        stage: ledger.merged(other[stage] for other in ranks[1:] if stage in other)
        for stage, ledger in ranks[0].items()
    }


def describe(fault: FaultRecord) -> str:
    """Say in a few words of one line which sample is faulty and why."""
    return (
        f"`{_printable(fault['shard'])}` key `{_printable(fault['key'])}` at byte "
        f"{fault['offset']}: {fault['reason']} ({_printable(fault['detail'])})"
    )


def _printable(text: str) -> str:
    """Escape what would break a line, colour a terminal or not be written at all."""
    cut = text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def write_report(folder: Path, stages: dict[str, Ledger], *, is_partial: bool = False) -> None:
    """Write ``data_report.json`` into a run directory, atomically.

    Stages that an earlier command has reported and this one did not run are kept.

    Args:
        folder: The run directory.
        stages: Accounts by stage.
        is_partial: Say in the report that other ranks' counts since the last checkpoint are not
            in it.

    Raises:
        StorageError: If it cannot be written.
    """
    reports = _read_reports(folder / REPORT_NAME)
    note = {"is_partial": True} if is_partial else {}
    reports.update({stage: {**ledger.report(), **note} for stage, ledger in stages.items()})
    write_bytes_atomic(
        folder / REPORT_NAME, json.dumps(_sorted(reports), indent=2).encode() + b"\n"
    )


def _read_reports(path: Path) -> dict[str, Any]:
    """Read what earlier commands have reported; a damaged report is written anew."""
    try:
        reports = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return reports if isinstance(reports, dict) else {}
