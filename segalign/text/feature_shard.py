"""One file of a feature store, while it is being filled.

Dims: N sequences of a file, T their tokens, D text width, E width of pooled features.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from segalign.errors import DataError
from segalign.text.clip_tower import TokenFeatures
from segalign.text.digest_index import Digest
from segalign.text.tokenizer import TokenIds


@dataclass
class FeatureShard:
    """Features that are to become one file.

    Attributes:
        dtype: Number type of the features.
        sequences: Token sequences and their digests, in order.
        rows: Features of each sequence's tokens, ``(S, D)``.
        pooled: Pooled features of each sequence, ``(E,)``.
        num_bytes: Bytes of all features.
    """

    dtype: torch.dtype
    sequences: dict[TokenIds, Digest] = field(default_factory=dict)
    rows: list[Tensor] = field(default_factory=list)
    pooled: list[Tensor] = field(default_factory=list)
    num_bytes: int = 0

    def add(self, features: TokenFeatures, sequences: dict[TokenIds, Digest]) -> None:
        """Take the features of some sequences over."""
        rows = features.rows.to("cpu", self.dtype)
        pooled = features.pooled.to("cpu", self.dtype)
        if not (rows.isfinite().all() and pooled.isfinite().all()):
            raise DataError(
                f"features must be finite numbers of {self.dtype}; some are not; "
                "choose `--dtype float32`, or another text model"
            )
        for sequence in sequences:
            first = features.first_rows[sequence]
            self.rows.append(rows[first : first + len(sequence)].clone())
            self.pooled.append(pooled[features.pooled_rows[sequence]].clone())
            self.num_bytes += self.rows[-1].nbytes + self.pooled[-1].nbytes
        self.sequences |= sequences

    def tensors(self) -> dict[str, Tensor]:
        """Put the features below each other: ``rows (T, D)``, ``pooled (N, E)``, first rows."""
        lengths = torch.tensor([0, *map(len, self.sequences)])
        return {
            "rows": torch.cat(self.rows),
            "pooled": torch.stack(self.pooled),
            "first_rows": lengths.cumsum(0),
            "digests": torch.tensor(list(self.sequences.values()), dtype=torch.int64),
        }
