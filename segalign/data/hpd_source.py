"""A source in the layout of HPDv2: a JSON array of prompts with two or more images, judged."""

from array import array
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np

from segalign.data.captions import (
    Ties,
    check_caption,
    check_tie,
    parse_json_object,
    parse_preference,
)
from segalign.data.faults import SampleFault
from segalign.data.json_items import JsonItems
from segalign.data.jsonl_sources import existing_root, image_below
from segalign.data.long_captions import LongCaptions
from segalign.data.sources import ImageCheck, Members, to_json_member
from segalign.errors import DataError

PairChoice = Literal["all", "adjacent"]
_KEYS: Final = ("caption", "item", "path_0", "path_1", "preferred_path")
_MAX_IMAGES: Final = 100


class HpdSource:
    """Items with ``prompt``, their images and a judgement; n ranked images give several pairs.

    The images are ``file_path`` or ``image_path``. The judgement is ``human_preference`` of two
    images (1 for the preferred one), or ``rank`` of any number (lower is better, equal is a tie).

    Args:
        path: The JSON file.
        image_root: Folder that the paths are relative to and must stay in.
        pairs: Of n ranked images: all n (n - 1) / 2 pairs, or the n - 1 of neighbours in rank.
        captions: Long captions that replace the prompts.
        ties: Whether ties are packed.
        check: How far each image is decoded before it is packed.

    Raises:
        DataError: If the file cannot be read, is no JSON array of objects or is empty.
        ConfigError: If the captions' key is no field.
    """

    def __init__(
        self,
        path: Path,
        *,
        image_root: Path,
        pairs: PairChoice = "all",
        captions: LongCaptions | None = None,
        ties: Ties = "keep",
        check: ImageCheck = "header",
    ) -> None:
        if captions is not None:
            captions.check_key(_KEYS)
        self._path = path
        self._root = existing_root(image_root)
        self._pairs: PairChoice = pairs
        self._captions = captions
        self._ties: Ties = ties
        self._check: ImageCheck = check
        items = JsonItems(path)
        places = array("q")
        for offset, size, item in items:
            places.extend((offset, size, max(1, len(choose_pairs(item, pairs)))))
        if not places:
            raise DataError(f"`{path}` must hold prompts with images; it is empty; check it")
        self._places = np.frombuffer(places, dtype=np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._places[:, 2])
        self._content = items.digest

    def __len__(self) -> int:
        return int(self._ends[-1])

    def settings(self) -> dict[str, Any]:
        """See ``Source``."""
        return {
            "kind": "hpd",
            "check": self._check,
            "pairs": self._pairs,
            "ties": self._ties,
            "content": self._content,
            **(self._captions.settings() if self._captions is not None else {}),
        }

    def origin(self, index: int) -> str:
        """See ``Source``."""
        item, pair = self._place(index)
        return f"item {item}, pair {pair}"

    def members(self, index: int) -> Members:
        """See ``Source``."""
        number, pair = self._place(index)
        item = self._read(number)
        paths, probs = judged_pair(item, pair, self._pairs)
        check_tie(probs, self._ties)
        fields = {
            "caption": item.get("prompt"),
            "item": number,
            "num_pairs": int(self._places[number, 2]),
            "path_0": paths[0],
            "path_1": paths[1],
            "preferred_path": None if probs[0] == probs[1] else paths[probs[1] > probs[0]],
            "preference_probs": list(probs),
        }
        if self._captions is not None:
            fields = self._captions.join(fields)
        fields["caption"] = check_caption(fields["caption"])
        images = []
        for place, path in enumerate(paths):
            suffix, content = image_below(self._root, path, self._check)
            images.append((f"{place}.{suffix}", content))
        return [*images, to_json_member(fields)]

    def _place(self, index: int) -> tuple[int, int]:
        """Return which item a pair belongs to, and which of its pairs it is."""
        item = int(np.searchsorted(self._ends, index, side="right"))
        return item, index - int(self._ends[item] - self._places[item, 2])

    def _read(self, number: int) -> dict[str, Any]:
        offset, size, _ = self._places[number]
        with self._path.open("rb") as file:
            file.seek(int(offset))
            return parse_json_object(file.read(int(size)))


def choose_pairs(item: dict[str, Any], choice: PairChoice) -> list[tuple[int, int]]:
    """Choose pairs of an item's images, the earlier image first; none if it is not judged soundly.

    Neighbours are those in the order of rank; images of equal rank are in their own order.
    """
    ranks = _ranks(item)
    if ranks is None:
        return []
    if choice == "all":
        return list(combinations(range(len(ranks)), 2))
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    return [(min(pair), max(pair)) for pair in pairwise(order)]


def judged_pair(
    item: dict[str, Any], number: int, choice: PairChoice
) -> tuple[tuple[object, object], tuple[float, float]]:
    """Return the two paths of one of an item's pairs, and the preference.

    Raises:
        SampleFault: If the item has no images or no sound judgement.
    """
    paths = _paths(item)
    if paths is None:
        raise SampleFault("image_missing", "the item has no `file_path` or `image_path` of a pair")
    if "human_preference" not in item and "rank" not in item:
        raise SampleFault("preference_missing", "the item has no `human_preference` and no `rank`")
    ranks, pairs = _ranks(item), choose_pairs(item, choice)
    if ranks is None:
        judgement = item.get("human_preference", item.get("rank"))
        detail = f"{judgement!r:.60} does not judge {len(paths)} images soundly"
        raise SampleFault("preference_invalid", detail)
    first, second = pairs[number]
    if "human_preference" in item:
        probs = parse_preference({"preference_probs": item["human_preference"]})
    else:
        better = (ranks[first] < ranks[second]) - (ranks[first] > ranks[second])
        probs = ((1 + better) / 2, (1 - better) / 2)
    return (paths[first], paths[second]), probs


def _paths(item: dict[str, Any]) -> Sequence[object] | None:
    paths = item.get("file_path", item.get("image_path"))
    return paths if isinstance(paths, list) and len(paths) >= 2 else None


def _ranks(item: dict[str, Any]) -> list[float] | None:
    """Return a rank for each image, lower is better; None if there is none for each."""
    paths = _paths(item)
    judgement = item.get("human_preference", item.get("rank"))
    if paths is None or not isinstance(judgement, list) or len(judgement) != len(paths):
        return None
    if len(paths) > _MAX_IMAGES:
        return None
    if not all(_is_finite(value) for value in judgement):
        return None
    if "human_preference" in item:
        return [-value for value in judgement] if len(paths) == 2 else None
    return cast("list[float]", judgement)


def _is_finite(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(cast("float", value)) < float("inf")
