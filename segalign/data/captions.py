"""Read captions, their metadata and preferences from untrusted bytes."""

import json
import unicodedata
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias, cast

from segalign.data.faults import SampleFault

MAX_CAPTION_BYTES: Final = 64 * 1024
MAX_JSON_BYTES: Final = 1024 * 1024
_SUM_TOLERANCE: Final = 1e-3
Ties: TypeAlias = Literal["keep", "set_aside"]


def check_caption(caption: object) -> str:
    """Return the caption without surrounding white space.

    Raises:
        SampleFault: If it is no text, empty, has no word or sign in it, holds NUL or a lone
            surrogate, or is longer than ``MAX_CAPTION_BYTES``.
    """
    if caption is None:
        raise SampleFault("caption_missing", "there is no `caption`")
    if not isinstance(caption, str):
        raise SampleFault("json_invalid", f"`caption` is {type(caption).__name__}, not a string")
    stripped = caption.strip()
    if not stripped:
        raise SampleFault("caption_empty", "the caption is empty")
    if "\0" in stripped:
        raise SampleFault("caption_nul", "the caption holds a NUL character")
    try:
        num_bytes = len(stripped.encode())
    except UnicodeEncodeError as err:
        raise SampleFault("caption_not_utf8", "the caption holds a lone surrogate") from err
    if num_bytes > MAX_CAPTION_BYTES:
        raise SampleFault("caption_too_long", f"{num_bytes} bytes, at most {MAX_CAPTION_BYTES}")
    if not any(map(_is_content, stripped)):
        raise SampleFault("caption_empty", "the caption is punctuation only")
    return stripped


def decode_utf8(raw: bytes) -> str:
    """Decode strict UTF-8; a byte order mark at the start is dropped.

    Raises:
        SampleFault: If the bytes are not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise SampleFault("caption_not_utf8", f"byte {err.start} is not UTF-8") from err


def parse_caption_text(raw: bytes) -> str:
    """Read the caption of a ``.txt`` member.

    Raises:
        SampleFault: See ``check_caption`` and ``decode_utf8``.
    """
    if len(raw) > MAX_JSON_BYTES:
        raise SampleFault("caption_too_long", f"{len(raw)} bytes, at most {MAX_CAPTION_BYTES}")
    return check_caption(decode_utf8(raw))


def parse_json_object(raw: bytes) -> dict[str, Any]:
    """Read a ``.json`` member.

    Raises:
        SampleFault: If it is no JSON object or larger than ``MAX_JSON_BYTES``.
    """
    if len(raw) > MAX_JSON_BYTES:
        raise SampleFault("json_invalid", f"{len(raw)} bytes, at most {MAX_JSON_BYTES}")
    text = decode_utf8(raw)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise SampleFault("json_invalid", f"not JSON: {err}") from err
    if not isinstance(fields, dict):
        raise SampleFault("json_invalid", f"expected an object, got {type(fields).__name__}")
    return fields


def read_caption(members: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return a sample's caption and metadata.

    Args:
        members: Bytes by suffix. The caption is that of ``txt``, or else the field ``caption``
            of ``json``; the other fields of ``json`` are the metadata.

    Raises:
        SampleFault: If there is neither member, or the caption is not usable.
    """
    fields = parse_json_object(members["json"]) if "json" in members else {}
    caption = fields.pop("caption", None)
    if "txt" in members:
        return parse_caption_text(members["txt"]), fields
    if "json" not in members:
        raise SampleFault("caption_missing", "there is no `txt` and no `json` member")
    return check_caption(caption), fields


def parse_preference(fields: dict[str, Any]) -> tuple[float, float]:
    """Read the probabilities that image 0 and image 1 are preferred; they sum to 1.

    Args:
        fields: ``preference_probs: [p0, p1]``, or ``label``: the index of the preferred image
            (0 or 1), or 0.5 for a tie.

    Raises:
        SampleFault: If neither is there or the numbers are no probabilities.
    """
    if "preference_probs" in fields:
        probs = fields["preference_probs"]
        if not isinstance(probs, list) or len(probs) != 2 or not all(map(_is_probability, probs)):
            raise SampleFault(
                "preference_invalid", f"`preference_probs` is {probs!r:.60}, not two probabilities"
            )
        first, second = float(probs[0]), float(probs[1])
        if abs(first + second - 1) > _SUM_TOLERANCE:
            raise SampleFault(
                "preference_invalid", f"`preference_probs` is {probs!r:.60}, which sum to no 1"
            )
        return first / (first + second), second / (first + second)
    label = fields.get("label")
    if not _is_number(label) or label not in (0, 0.5, 1):
        raise SampleFault("preference_invalid", f"`label` is {label!r:.60}, not 0, 1 or 0.5")
    return 1.0 - float(label), float(label)


def is_tie(probs: tuple[float, float]) -> bool:
    """Tell whether neither image is preferred."""
    return probs[0] == probs[1]


def check_tie(probs: tuple[float, float], ties: Ties) -> tuple[float, float]:
    """Return a preference, unless it is a tie and these are set aside.

    Raises:
        SampleFault: If it is one and they are.
    """
    if ties == "set_aside" and is_tie(probs):
        raise SampleFault("preference_tie", "neither image is preferred")
    return probs


def _is_content(character: str) -> bool:
    """Tell whether a character is more than punctuation, white space or control."""
    return character.isalnum() or unicodedata.category(character)[0] not in "PZC"


def _is_probability(value: object) -> bool:
    """Tell whether a JSON value is a number in [0, 1]; NaN is not."""
    return _is_number(value) and 0 <= cast("float", value) <= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
