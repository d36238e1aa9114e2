"""Which shards hold preferences that something can be learnt from."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from segalign.data.captions import MAX_JSON_BYTES, is_tie, parse_json_object, parse_preference
from segalign.data.faults import SampleFault
from segalign.data.manifest import Manifest
from segalign.data.sources import Members
from segalign.errors import DataError


def count_preference(members: Members) -> dict[str, int]:
    """Count one sample: ``pairs`` 1 if it is a pair of images, ``ties`` 1 if neither is preferred.

    Args:
        members: Suffix and bytes of its members, which were checked.
    """
    by_suffix = dict(members)
    if not any(suffix.startswith("0.") for suffix in by_suffix):
        return {}
    return {"pairs": 1, "ties": int(_is_clear(by_suffix.get("json", b"")) is False)}


def add_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add counts by name."""
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part)
    return dict(total)


def require_preference(manifest: Manifest) -> None:
    """See that at least one pair says which image is preferred; reading stops at the first.

    Args:
        manifest: Shards of preference pairs.

    Raises:
        DataError: If all usable pairs are ties, so that pairwise losses would learn nothing.
    """
    num_ties = 0
    for raw in _json_members(manifest):
        is_clear = _is_clear(raw)
        if is_clear:
            return
        num_ties += is_clear is False
    if num_ties:
        raise DataError(
            f"preference pairs must say which image is preferred; all {num_ties} of "
            f"`{manifest.folder}` are ties, from which nothing is learnt; check their labels"
        )


def _json_members(manifest: Manifest) -> Iterator[bytes]:
    for number, shard in enumerate(manifest.shards):
        # What cannot be read is set aside, and told, where it is trained on.
        with contextlib.suppress(OSError), (manifest.folder / shard.name).open("rb") as file:
            for sample in manifest.samples(number):
                for suffix, offset, size, _ in sample.members:
                    if suffix == "json" and size <= MAX_JSON_BYTES:
                        file.seek(offset)
                        yield file.read(size)


def _is_clear(raw: bytes) -> bool | None:
    """Tell whether an image is preferred; None if that cannot be read."""
    try:
        return not is_tie(parse_preference(parse_json_object(raw)))
    except SampleFault:
        return None
