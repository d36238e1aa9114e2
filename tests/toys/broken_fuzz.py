"""Readers without a check that fuzzing relies on, for the duration of a monkeypatch."""

import json
from pathlib import Path
from typing import Any

import fuzz_targets
import pytest
import torch

from segalign.data import captions, manifest
from segalign.launch import yaml_dialect
from segalign.text import caption_plan, segmenter


def loses_text(patch: pytest.MonkeyPatch) -> None:
    """Drops the blanks at the end of each piece of a caption."""
    cut = segmenter._sentences
    patch.setattr(segmenter, "_sentences", lambda window: [one.rstrip() for one in cut(window)])


def forgets_the_budget(patch: pytest.MonkeyPatch) -> None:
    """Keeps all tokens of a caption, however many."""
    patch.setattr(caption_plan, "share_budget", lambda counts, *_: list(counts))


def takes_any_number(patch: pytest.MonkeyPatch) -> None:
    """Takes every value for a place in a shard."""
    patch.setattr(manifest, "_is_count", lambda _: True)


def takes_any_json(patch: pytest.MonkeyPatch) -> None:
    """Raises whatever JSON raises."""

    def parse(raw: bytes) -> Any:
        return json.loads(raw)

    patch.setattr(fuzz_targets, "parse_json_object", parse)
    assert captions.parse_json_object is not parse


def decodes_anything(patch: pytest.MonkeyPatch) -> None:
    """Raises whatever a checkpoint's foreign state raises."""
    from segalign import run_format, tree_codec

    patch.setattr(run_format, "decode_tree", tree_codec._decode)
    patch.setattr(run_format, "DataError", RuntimeError)


def follows_all_aliases(patch: pytest.MonkeyPatch) -> None:
    """Follows aliases of YAML that hold themselves."""
    patch.setattr(yaml_dialect, "check_size", lambda *_: None)


def raises_what_pickles_raise(patch: pytest.MonkeyPatch) -> None:
    """Passes on what a damaged pickle raises."""
    from segalign.formats import official_lora

    def read(path: Path, **_: str) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True)

    patch.setattr(official_lora, "read_tensor_pickle", read)
