"""What an evaluation has found, as a file; and tables of several, if they may be compared.

It imports no torch, so that a table of results starts at once.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from segalign.atomic import write_text_atomic
from segalign.errors import DataError
from segalign.json_text import parse_json
from segalign.metrics.metric_protocol import protocol_digest

FORMAT: Final = 1
_DIGITS: Final = 12


@dataclass(frozen=True, kw_only=True)
class MetricResult:
    """What one metric has found.

    Attributes:
        values: Numbers by name; NaN where there is none.
        protocol: All that they depend on besides images and captions, plain data.
        notes: What a reader must know.
    """

    values: Mapping[str, float]
    protocol: Mapping[str, Any]
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class FailedImage:
    """An image that could not be made.

    Attributes:
        place: Its place in the plan.
        caption: Its caption.
        error: What happened, on one line.
    """

    place: int
    caption: str
    error: str


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """All numbers of an evaluation, and all that they depend on.

    Attributes:
        model: What was evaluated, plain data; ``name`` is what tables call it.
        weights: ``raw`` or ``ema``.
        num_captions: Captions.
        images_per_caption: Images of each.
        batch_size: Images made at a time on each rank.
        eval_seed: Seed of the images' noise.
        prompts: Digest of ids and captions, see `segalign.evaluation.captions.captions_digest`.
        metrics: By the metric's name.
        num_counted: Images that count.
        num_non_finite: Images that do not because they are not finite.
        failures: Images that do not because they could not be made.
        versions: Of libraries, by name.
        created: When it was done, ISO 8601.
        seconds: How long it took.
    """

    model: Mapping[str, Any]
    weights: str
    num_captions: int
    images_per_caption: int
    batch_size: int
    eval_seed: int
    prompts: str
    metrics: Mapping[str, MetricResult]
    num_counted: int
    num_non_finite: int = 0
    failures: Sequence[FailedImage] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """What tables call the model."""
        return str(self.model.get("name") or "model")

    @property
    def values(self) -> dict[str, float]:
        """All metrics' numbers."""
        return {name: v for one in self.metrics.values() for name, v in one.values.items()}

    @property
    def conditions(self) -> dict[str, Any]:
        """What must be equal where numbers are compared; protocols are under ``metrics``."""
        return {
            "prompts": self.prompts,
            "num_captions": self.num_captions,
            "images_per_caption": self.images_per_caption,
            "metrics": {name: plain(one.protocol) for name, one in self.metrics.items()},
        }

    def digest(self) -> str:
        """Digest of the conditions, SHA-256 in hexadecimal: equal if all numbers may be compared.

        Seed, micro-batch, model and weights are not among them.
        """
        return protocol_digest(self.conditions)

    def to_json(self) -> str:
        """Write strict JSON; numbers that are not finite are null."""
        content = {"format": FORMAT, "digest": self.digest(), **plain(asdict(self))}
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            StorageError: If it cannot be written.
        """
        write_text_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            DataError: If it is missing, or no result of this format.
        """
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            digest = content.pop("digest")
            content["metrics"] = {n: _metric(one) for n, one in content["metrics"].items()}
            content["failures"] = tuple(FailedImage(**one) for one in content["failures"])
            found = cls(**content)
            if found.digest() != digest:
                raise ValueError("protocols that were changed by hand")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            text = getattr(error, "strerror", None) or str(error) or type(error).__name__
            reason = " ".join(text.split())
            raise DataError(
                f"expected the result of an evaluation in `{path}`; got: {reason}; "
                "give a `result.json` that `python main.py test` wrote"
            ) from error
        return found


def plain(value: Any) -> Any:
    """Turn what is nearly JSON into what is: tuples to lists, NaN and infinities to None.

    Raises:
        TypeError: If a value is of another kind, which no file can hold.
    """
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"expected plain data for a result; got `{type(value).__name__}`")


def short(digest: str) -> str:
    """Shorten a digest for people."""
    return digest[:_DIGITS]


def _metric(content: Mapping[str, Any]) -> MetricResult:
    values = {n: math.nan if v is None else float(v) for n, v in content["values"].items()}
    return MetricResult(values=values, protocol=content["protocol"], notes=tuple(content["notes"]))
