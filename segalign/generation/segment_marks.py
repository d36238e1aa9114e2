"""How a prompt looks to a text encoder: its segments, their tokens, and what is dropped."""

from collections.abc import Iterable

import torch

from segalign.generation.contact_sheet import MarkedSegment
from segalign.text.caption_plan import SegmentTokens, plan_caption
from segalign.text.clip_tower import ClipTower
from segalign.text.conditioning import TextConditioner
from segalign.text.joined_encoder import JoinedEncoder
from segalign.text.segment_encoder import SegmentEncoder
from segalign.text.segmenter import Segment


def mark_prompt(conditioner: TextConditioner, prompt: str) -> list[MarkedSegment]:
    """Mark the segments of a prompt.

    Args:
        conditioner: Text encoder; of joined ones the first that splits captions is shown.
        prompt: The prompt.

    Returns:
        Pieces whose texts join to the prompt. An encoder that does not split gives one piece; its
        tokens are counted with the special ones.
    """
    encoder = _segment_encoder(conditioner)
    if encoder is not None:
        return _mark_segments(encoder, prompt)
    with torch.no_grad():
        counts = conditioner([prompt]).report.totals()
    num_dropped = counts["dropped_tokens"]
    return [MarkedSegment(prompt, counts["kept_tokens"] + num_dropped, num_dropped, False)]


def _segment_encoder(conditioner: TextConditioner) -> SegmentEncoder | None:
    parts: Iterable[object] = [conditioner]
    if isinstance(conditioner, JoinedEncoder):
        parts = conditioner.parts
    return next((part for part in parts if isinstance(part, SegmentEncoder)), None)


def _mark_segments(encoder: SegmentEncoder, prompt: str) -> list[MarkedSegment]:
    whole = encoder.segmenter.split(prompt)
    plan = plan_caption(
        whole,
        encoder.tower,
        policy=encoder.policy,
        token_budget=encoder.token_budget,
        long_segments=encoder.long_segments,
        over_budget=encoder.over_budget,
    )
    starts = {segment.start for segment in whole}
    waiting = list(reversed(plan.tokens))
    marks: list[MarkedSegment] = []
    for piece in encoder.split(prompt):
        num_tokens, num_kept = _count(encoder.tower, piece, waiting)
        marks.append(
            MarkedSegment(
                prompt[piece.start : piece.end],
                num_tokens,
                num_tokens - num_kept,
                piece.start not in starts,
            )
        )
    return marks


def _count(tower: ClipTower, piece: Segment, waiting: list[SegmentTokens]) -> tuple[int, int]:
    """Count the word tokens of a piece, and those of them that the plan keeps.

    Args:
        tower: The encoder's tower.
        piece: The next piece.
        waiting: Kept tokens of the pieces that follow, the next one last; it is taken out.
    """
    words = tower.word_ids(piece.text)
    read = tower.wrap(words[: tower.max_word_tokens])
    # Pieces of which nothing is kept are not in the plan.
    if not words or not waiting or waiting[-1].input_ids != read:
        return len(words), 0
    positions = waiting.pop().positions
    return len(words), int(((positions > 0) & (positions < len(read) - 1)).sum())
