"""See that a common direction fits the scorer and the batch that it is used with.

Dims: E joint-embedding width.
"""

import copy
import hashlib
import json
import logging
from typing import Any

import torch
from torch import nn

from segalign.errors import ConfigError, DataError
from segalign.json_text import parse_json
from segalign.rewards.batch_directions import ESTIMATE_COMMAND, MIN_BATCH, check_not_single
from segalign.rewards.common_direction import CommonDirection, CorpusDirection
from segalign.rewards.segment_scorer import SegmentScorer
from segalign.rewards.trained_parts import merge_adapters
from segalign.text.feature_store import weights_digest
from segalign.text.segmenter import Segmenter
from segalign.text.segmenters import build_segmenter, describe_segmenter

WHOLE, SEGMENTS = "whole", "segments"
_logger = logging.getLogger(__name__)


def text_digest(scorer: SegmentScorer) -> str:
    """Hash what a scorer embeds texts with: text model and projection, 32 hex digits.

    Moves leave it as it is; casts do not, so take it of the weights as they were read. Of a
    ``CLIPModel`` and of the same weights in ``open_clip``'s own layout it differs. With low-rank
    adapters it is that of the merged weights, and so of the folder that such a run is exported to.
    """
    text_model = _without_adapters(scorer.tower.text_model)
    digest = hashlib.blake2b(weights_digest(text_model).encode(), digest_size=16)
    # Towers of `open_clip` hold their projection themselves.
    projection = getattr(scorer.model, "text_projection", None)
    if isinstance(projection, nn.Module):
        for name, weight in sorted(_without_adapters(projection).state_dict().items()):
            digest.update(f"\n{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
            raw = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
    return digest.hexdigest()


def _without_adapters(part: Any) -> Any:
    """Return a part of a model; of one with adapters, what export makes of it: merged, float32."""
    if not any(".lora_A." in f".{name}" for name in part.state_dict()):
        return part
    # On the CPU, where export merges too: other processors round products differently.
    merged = nn.ModuleDict({"part": copy.deepcopy(part).cpu()})
    merge_adapters(merged)
    return merged["part"].float()


def describe_text(segmenter: Segmenter | None) -> str:
    """Describe how captions become features.

    Returns:
        ``whole``, or ``segments`` with the segmenter's settings as JSON, which
        `described_segmenter` understands; of a segmenter from elsewhere, the name of its class.
    """
    if segmenter is None:
        return WHOLE
    try:
        description = describe_segmenter(segmenter)
    except ConfigError:
        kind = type(segmenter)
        description = {"class": f"{kind.__module__}.{kind.__qualname__}"}
    return f"{SEGMENTS} {json.dumps(description, sort_keys=True)}"


def described_segmenter(text: str) -> Segmenter | None:
    """Build the segmenter of a description by `describe_text`; None is whole captions.

    Raises:
        DataError: If the description is none, or of a segmenter from elsewhere.
    """
    kind, _, description = text.partition(" ")
    if text == WHOLE:
        return None
    try:
        if kind != SEGMENTS:
            raise ValueError(f"`{text:.60}`")
        return build_segmenter(parse_json(description))
    except ValueError as error:
        raise DataError(
            "expected a common direction of whole captions, or of segments by a segmenter of this "
            f"package; got: {error}; estimate one with `{ESTIMATE_COMMAND}`"
        ) from error


def check_direction(direction: CommonDirection, model_digest: str, text: str) -> None:
    """Refuse a saved direction of another model or of another use of captions.

    Another segmenter is warned of: means of segments point much alike however captions are split.
    Estimates that follow the batches always fit.

    Args:
        direction: The direction.
        model_digest: That of the scorer, by `text_digest`.
        text: How it embeds captions, by `describe_text`.

    Raises:
        DataError: If the direction was estimated with other text weights, or with whole captions
            where segments are scored, or the other way round.
    """
    if not isinstance(direction, CorpusDirection):
        return
    direction.check_model(model_digest)
    estimated = direction.provenance.text
    if estimated == text:
        return
    kind = text.partition(" ")[0]
    if estimated.partition(" ")[0] != kind:
        raise DataError(
            f"expected a common direction of captions as they are scored ({text}); got one of "
            f"{estimated}; estimate one with `{ESTIMATE_COMMAND} --text {kind}`"
        )
    _logger.warning(
        "the common direction was estimated of %s and is used on %s; better estimate one with `%s`",
        estimated,
        text,
        ESTIMATE_COMMAND,
    )


def check_batch_estimate(num_captions: int) -> None:
    """Refuse a direction that is estimated from one caption, and warn of few.

    Args:
        num_captions: Captions of one estimate: a rank's batch times the ranks. The accumulation of
            gradients adds none.

    Raises:
        ConfigError: If it is 1: the text-relevant part would be weakened as much as the other.
    """
    check_not_single(num_captions)
    if num_captions < MIN_BATCH:
        _logger.warning(
            "each common direction will be estimated from %d captions; below %d the text-relevant "
            "part is weakened by up to 1/%d; use a direction of a corpus, made with `%s`",
            num_captions,
            MIN_BATCH,
            num_captions,
            ESTIMATE_COMMAND,
        )
