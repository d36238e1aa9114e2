"""Why a sample can be set aside: one exception, one list of reasons."""

from typing import Final, TypedDict

REASONS: Final = (
    "caption_empty",
    "caption_missing",
    "caption_not_utf8",
    "caption_nul",
    "caption_too_long",
    "checksum",
    "image_format",
    "image_missing",
    "image_size",
    "image_too_large",
    "image_unreadable",
    "json_invalid",
    "member_too_large",
    "path_outside_root",
    "preference_invalid",
    "preference_missing",
    "preference_tie",
    "questions_invalid",
    "read_error",
)


class SampleFault(Exception):  # noqa: N818 - a fault of one sample, not an error of the run
    """One sample that cannot be used; the run goes on without it.

    Attributes:
        reason: One of ``REASONS``; reports count by it.
        detail: What exactly was wrong, for the log.
    """

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class FaultRecord(TypedDict):
    """Where a faulty sample lies and what was wrong with it.

    Attributes:
        shard: File name of the shard.
        key: Key of the sample in the shard.
        offset: Byte offset of its first member in the shard; -1 if it is not known.
        reason: One of ``REASONS``.
        detail: What exactly was wrong.
        row: Row of the batch that holds the sample's empty slot.
        epoch: Epoch in which the sample was met.
        position: Its place in the sequence over all ranks; -1 if it is not known.
    """

    shard: str
    key: str
    offset: int
    reason: str
    detail: str
    row: int
    epoch: int
    position: int
