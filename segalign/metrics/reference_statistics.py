"""What is kept of real images: the statistics of their features, with the protocol they belong to.

Dims: N images, d features.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from segalign.atomic import write_bytes_atomic
from segalign.errors import DataError
from segalign.evaluation.image_metric import EvaluationSetting
from segalign.json_text import parse_json
from segalign.metrics.extractors.protocol import FeatureExtractor
from segalign.metrics.feature_statistics import FeatureStatistics
from segalign.metrics.metric_protocol import check_same_protocol

_ROWS: Final = "rows"
_PROTOCOL: Final = "protocol"


class ReferenceStatistics:
    """Features of real images, summed, and row by row where a kernel needs them.

    Args:
        statistics: Their sums.
        rows: The features themselves, float32 ``(N, d)`` in the order of sample ids, or None.
        protocol: Plain data: ``extractor``, the extractor's protocol, and ``images``, what the
            images are (digest of the manifest, count, size, crop).

    Raises:
        DataError: If rows do not fit the statistics, or the protocol says nothing of the extractor.
    """

    def __init__(
        self, statistics: FeatureStatistics, rows: Tensor | None, protocol: dict[str, Any]
    ) -> None:
        shape = (statistics.num_samples, statistics.num_features)
        if rows is not None and (rows.shape != shape or rows.dtype != torch.float32):
            raise DataError(
                f"expected rows of reference features to be float32 of shape {shape}; got "
                f"{rows.dtype} of shape {tuple(rows.shape)}; compute the statistics again"
            )
        if not isinstance(protocol.get("extractor"), Mapping):
            raise DataError(
                "expected `extractor` in the protocol of reference statistics; got "
                f"{protocol!s:.80}; compute the statistics again"
            )
        self.statistics = statistics
        self.rows = rows
        self.protocol = dict(protocol)

    def check(self, extractor_protocol: Mapping[str, Any]) -> None:
        """Check that images measured by an extractor may be compared with these.

        Raises:
            DataError: If its protocol differs; the message names the field.
        """
        what = "the extractor of the reference statistics and that of the images"
        check_same_protocol(self.protocol["extractor"], extractor_protocol, what)

    def without_rows(self) -> Self:
        """Return the sums alone."""
        return self if self.rows is None else type(self)(self.statistics, None, self.protocol)

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
            StorageError: If it cannot be written.
        """
        tensors = self.statistics.tensors()
        if self.rows is not None:
            tensors[_ROWS] = self.rows.cpu().contiguous()
        protocol = json.dumps(self.protocol, ensure_ascii=True, allow_nan=False)
        write_bytes_atomic(path, save(tensors, metadata={_PROTOCOL: protocol}))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that ``save`` has written.

        Raises:
            DataError: If there is none, or it is another kind of file, or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            protocol = dict(parse_json(metadata[_PROTOCOL]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"expected reference statistics in `{path}`; got {_reason(error)}; make them with "
                "`main.py stats`"
            ) from error
        return cls(FeatureStatistics.from_tensors(tensors), tensors.get(_ROWS), protocol)


class ReferenceSource(Protocol):
    """Where the statistics of real images come from."""

    def statistics(
        self, extractor: FeatureExtractor, setting: EvaluationSetting
    ) -> ReferenceStatistics:
        """Read the statistics, or compute them; every rank must call it.

        Raises:
            DataError: If they are missing, or of another protocol.
        """
        ...


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return "no such file" if isinstance(error, FileNotFoundError) else "an unreadable file"
    return "a file without a protocol" if isinstance(error, KeyError) else "a damaged file"
