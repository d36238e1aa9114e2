"""Sources of captions alone: the prompts of a benchmark, with all that its questions need."""

import json
from array import array
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from segalign.data.captions import check_caption, parse_json_object
from segalign.data.faults import SampleFault
from segalign.data.json_items import JsonItems
from segalign.data.jsonl_sources import index_lines
from segalign.data.sources import Members, to_json_member
from segalign.errors import DataError

_NUM_PROBED: Final = 50


class PromptSource:
    """The objects of a JSON array, or of the lines of a ``.jsonl`` file: a prompt and other fields.

    A sample's JSON holds ``caption`` (the prompt), ``id``, ``prompt_set``, and all other fields as
    they are; a field ``caption`` that is not the prompt becomes ``other_caption``.

    Args:
        path: The file.
        prompt_set: Name of the benchmark.
        prompt_key: Field that is the prompt.
        id_key: Fields that make the id, joined by ``_``; without one of them the id is the
            place in the file.

    Raises:
        DataError: If the file cannot be read, is empty, is neither an array of objects nor lines,
            or none of its first entries has a prompt.
    """

    def __init__(
        self, path: Path, *, prompt_set: str, prompt_key: str, id_key: tuple[str, ...] = ("id",)
    ) -> None:
        self._path = path
        self._prompt_set = prompt_set
        self._prompt_key = prompt_key
        self._id_key = id_key
        if path.suffix == ".jsonl":
            lines = index_lines(path)
            ends = [*lines.offsets[1:].tolist(), path.stat().st_size]
            places = np.stack([lines.offsets, np.asarray(ends) - lines.offsets], axis=1)
            self._places, self._digest = places, lines.digest
        else:
            found, items = array("q"), JsonItems(path)
            for offset, size, _ in items:
                found.extend((offset, size))
            if not found:
                raise DataError(f"`{path}` must hold prompts; it is empty; check it")
            self._places = np.frombuffer(found, dtype=np.int64).reshape(-1, 2)
            self._digest = items.digest
        self._refuse_other_keys()

    def __len__(self) -> int:
        return len(self._places)

    def settings(self) -> dict[str, Any]:
        """See ``Source``."""
        return {
            "kind": "prompts",
            "prompt_set": self._prompt_set,
            "prompt_key": self._prompt_key,
            "id_key": list(self._id_key),
            "content": self._digest,
        }

    def origin(self, index: int) -> str:
        """See ``Source``."""
        return f"entry {index} at byte {self._places[index][0]}"

    def members(self, index: int) -> Members:
        """See ``Source``."""
        fields = self._read(index)
        prompt = check_caption(fields.pop(self._prompt_key, None))
        if "caption" in fields:
            fields["other_caption"] = fields.pop("caption")
        return [
            to_json_member(
                {
                    **fields,
                    "caption": prompt,
                    "id": self._id(fields, index),
                    "prompt_set": self._prompt_set,
                }
            )
        ]

    def _read(self, index: int) -> dict[str, Any]:
        offset, size = self._places[index].tolist()
        with self._path.open("rb") as file:
            file.seek(offset)
            return parse_json_object(file.read(size))

    def _id(self, fields: Mapping[str, Any], index: int) -> str:
        if any(key not in fields for key in self._id_key):
            return str(index)
        parts = [fields[key] for key in self._id_key]
        if any(isinstance(part, bool) or not isinstance(part, str | int) for part in parts):
            detail = f"the id is {json.dumps(parts):.60}, not text or an integer"
            raise SampleFault("json_invalid", detail)
        return "_".join(map(str, parts))

    def _refuse_other_keys(self) -> None:
        """Say what fields there are, instead of setting every entry aside."""
        known: set[str] = set()
        for fields in islice(self._sound_entries(), _NUM_PROBED):
            if self._prompt_key in fields:
                return
            known |= fields.keys()
        names = ", ".join(f"`{name:.40}`" for name in sorted(known)[:20]) or "nothing"
        raise DataError(
            f"`{self._path}` must hold prompts in the field `{self._prompt_key}`; its first "
            f"entries have {names}; name the field by `--prompt-key`"
        )

    def _sound_entries(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self)):
            try:
                yield self._read(index)
            except SampleFault:
                continue
