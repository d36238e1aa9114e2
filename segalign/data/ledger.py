"""Accounts of the samples: manifest = earlier + delivered + quarantined[reason] + not reached.

``delivered`` counts where a step consumes a sample, not where a worker read it.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from segalign.atomic import write_bytes_atomic
from segalign.data.faults import FaultRecord
from segalign.errors import DataError
from segalign.ranks import gather_objects

REPORT_NAME: Final = "data_report.json"
_MIN_SAMPLES_TO_JUDGE: Final = 300
_MAX_RECORDS: Final = 1000


@dataclass
class EpochAccount:
    """Counts of one epoch.

    Attributes:
        delivered: Valid samples that a step consumed.
        quarantined: Samples whose slot came without content, by reason.
        id_sum: Sum of the sample ids of both kinds; tells a doubled sample from a lost one.
    """

    delivered: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    id_sum: int = 0

    @property
    def reached(self) -> int:
        """Samples delivered or quarantined."""
        return self.delivered + self.quarantined.total()

    def add(self, other: "EpochAccount") -> None:
        """Add another rank's counts of the same epoch."""
        self.delivered += other.delivered
        self.quarantined.update(other.quarantined)
        self.id_sum += other.id_sum


class Ledger:
    """Count what steps consume, per epoch, on one rank; ledgers of all ranks can be merged.

    Args:
        num_samples: Samples of the manifest; None for a stream that has none.
        first_position: Positions of the sequence that earlier attempts of the run have consumed.
    """

    def __init__(self, num_samples: int | None, *, first_position: int = 0) -> None:
        self.num_samples = num_samples
        self.first_position = first_position
        self.epochs: dict[int, EpochAccount] = {}
        self.records: list[FaultRecord] = []

    @property
    def delivered(self) -> int:
        """Valid samples consumed in all epochs."""
        return sum(account.delivered for account in self.epochs.values())

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
        return self.first_position + sum(account.reached for account in self.epochs.values())

    def consume(
        self,
        sample_ids: Sequence[int],
        epochs: Sequence[int],
        valid: Sequence[bool],
        faults: Sequence[FaultRecord],
    ) -> None:
        """Count the rows of one batch, each ``(B,)``; rows without sample and fault are padding."""
        reasons = {fault["row"]: fault["reason"] for fault in faults}
        for row, (sample_id, epoch, is_valid) in enumerate(
            zip(sample_ids, epochs, valid, strict=True)
        ):
            if not is_valid and row not in reasons:
                continue
            account = self.epochs.setdefault(epoch, EpochAccount())
            account.id_sum += sample_id
            if is_valid:
                account.delivered += 1
            else:
                account.quarantined[reasons[row]] += 1
        room = _MAX_RECORDS - len(self.records)
        self.records.extend(list(faults)[:room])

    def check_bad_fraction(self, max_bad_fraction: float, *, strict: bool) -> None:
        """Stop a run whose data are not what they should be.

        Args:
            max_bad_fraction: Largest share of quarantined samples, in [0, 1], judged once a few
                hundred samples were met.
            strict: Stop at the first.

        Raises:
            DataError: If there are too many.
        """
        num_bad = self.quarantined.total()
        num_met = num_bad + self.delivered
        if num_bad == 0 or not (strict or num_met >= _MIN_SAMPLES_TO_JUDGE):
            return
        if strict or num_bad > max_bad_fraction * num_met:
            limit = "no sample (`strict`)" if strict else f"{max_bad_fraction:.2%} of the samples"
            raise DataError(
                f"at most {limit} may be unreadable; {num_bad} of {num_met} were, for example "
                f"{describe(self.records[0])}; run `shards verify --decode`, then mend the shards "
                f"or raise `max_bad_fraction`"
            )

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
            total.records.extend(ledger.records[: _MAX_RECORDS - len(total.records)])
        return total

    def report(self) -> dict[str, Any]:
        """Return the accounts as JSON-able values."""
        return {
            "manifest": self.num_samples,
            "first_position": self.first_position,
            "delivered": self.delivered,
            "quarantined": dict(self.quarantined),
            "epochs": [self._report_epoch(epoch) for epoch in sorted(self.epochs)],
            "faults": self.records,
        }

    def _report_epoch(self, epoch: int) -> dict[str, Any]:
        account = self.epochs[epoch]
        counts = {
            "epoch": epoch,
            "delivered": account.delivered,
            "quarantined": dict(account.quarantined),
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


def gather_stages(stages: dict[str, Ledger]) -> dict[str, Ledger]:
    """Merge the ledgers of all ranks, stage by stage; every rank must call it."""
    ranks = gather_objects(stages)
    return {
        stage: ledger.merged(other[stage] for other in ranks[1:] if stage in other)
        for stage, ledger in ranks[0].items()
    }


def describe(fault: FaultRecord) -> str:
    """Say in a few words which sample is faulty and why."""
    return (
        f"`{fault['shard']}` key `{fault['key']}` at byte {fault['offset']}: "
        f"{fault['reason']} ({fault['detail']})"
    )


def write_report(folder: Path, stages: dict[str, Ledger]) -> None:
    """Write ``data_report.json`` into a run directory, atomically.

    Stages that an earlier command has reported and this one did not run are kept.

    Raises:
        StorageError: If it cannot be written.
    """
    path = folder / REPORT_NAME
    reports = json.loads(path.read_bytes()) if path.exists() else {}
    reports.update({stage: ledger.report() for stage, ledger in stages.items()})
    write_bytes_atomic(path, json.dumps(reports, indent=2).encode() + b"\n")
