"""How many samples may be unreadable before a run is ended."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from segalign.data.faults import FaultRecord
from segalign.data.ledger import Ledger, describe
from segalign.errors import DataError

# What is not met yet could be sound: below so many samples a share says little.
_MIN_SAMPLES_TO_JUDGE: Final = 300
_MIN_SAMPLES_OF_A_SHARD: Final = 20


@dataclass(frozen=True)
class BadSampleLimits:
    """Limits of the samples that are set aside.

    Attributes:
        max_bad_fraction: Largest share of all samples met, in [0, 1]; of 300 samples as long as
            fewer were met, as if the rest of these were sound.
        max_bad_shard_fraction: Largest share of a shard's samples in one epoch, in [0, 1]; shards
            of fewer than 20 samples are not judged by themselves. Known without doubt: as long as
            the rest of the shard could be sound, the run goes on.
        strict: Allow none.
    """

    max_bad_fraction: float = 0.01
    max_bad_shard_fraction: float = 0.05
    strict: bool = False

    def find_excess(
        self,
        ledger: Ledger,
        shard_sizes: Mapping[str, int],
        epochs: Iterable[int] | None = None,
    ) -> DataError | None:
        """Judge accounts.

        Args:
            ledger: Of one rank or of all.
            shard_sizes: Samples of each shard, by its name.
            epochs: The epochs whose shards are looked at; None looks at all.

        Returns:
            What ends the run; None if all is well.
        """
        if not ledger.num_quarantined:
            return None
        excess = self._find_overall(ledger)
        for epoch in ledger.epochs if epochs is None else epochs:
            if excess is None and epoch in ledger.epochs:
                excess = self._find_by_shard(ledger, epoch, shard_sizes)
        return excess

    def _find_overall(self, ledger: Ledger) -> DataError | None:
        num_bad = ledger.num_quarantined
        num_met = num_bad + ledger.delivered
        num_judged = max(num_met, _MIN_SAMPLES_TO_JUDGE)
        if not self.strict and num_bad <= self.max_bad_fraction * num_judged:
            return None
        limit, way_out = "no sample (`strict`)", "leave `strict` out"
        if not self.strict:
            limit = f"{self.max_bad_fraction:.2%} of the samples"
            way_out = "raise `max_bad_fraction`"
        example = ledger.records[0]
        return DataError(
            f"at most {limit} may be unreadable; {num_bad} of {num_met} were, for example "
            f"{describe(example)}; run `shards verify --decode`, then mend the shard"
            f"{_if_replaced(example)}, or {way_out}"
        )

    def _find_by_shard(
        self, ledger: Ledger, epoch: int, shard_sizes: Mapping[str, int]
    ) -> DataError | None:
        for shard, num_bad in ledger.epochs[epoch].shards.items():
            size = shard_sizes.get(shard, 0)
            if size >= _MIN_SAMPLES_OF_A_SHARD and num_bad > self.max_bad_shard_fraction * size:
                example = next((one for one in ledger.records if one["shard"] == shard), None)
                return DataError(
                    f"at most {self.max_bad_shard_fraction:.2%} of a shard may be unreadable; "
                    f"{num_bad} of the {size} samples of `{shard}` were"
                    f"{'' if example is None else f', for example {describe(example)}'}; run "
                    f"`shards verify --decode`, then mend the shard"
                    f"{_if_replaced(example)} or leave it out, or raise `max_bad_shard_fraction`"
                )
        return None


def _if_replaced(example: FaultRecord | None) -> str:
    """Name a way out for who has exchanged shards below their manifest."""
    if example is None or example["reason"] != "checksum":
        return ""
    return " (if it was replaced on purpose: `shards index --force`)"
