"""``shards encode``: keep the features of a frozen text model on disk."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from segalign.errors import ConfigError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from segalign.text.clip_tower import ClipTower
    from segalign.text.store_writer import StoreReport
    from segalign.text.text_states import TextModel


def encode_parser() -> ArgumentParser:
    """Build the parser of the sub-command's arguments."""
    parser = ArgumentParser(
        description="encode every distinct segment of all captions once; "
        "a killed run goes on where it stopped"
    )
    parser.add_argument("shards", type=str, help="shards with their manifest")
    parser.add_argument("store", type=str, help="folder for the features")
    parser.add_argument(
        "--model",
        type=str,
        required=True,
        help="text-to-image model: local diffusers folder, hub id `owner/name`, or `scenes`",
    )
    parser.add_argument("--tower", type=Literal[1, 2], default=1, help="2: SDXL's second")
    parser.add_argument(
        "--layer", type=int, default=-1, help="-1: after the final norm; SDXL reads -2"
    )
    parser.add_argument(
        "--segmenter",
        choices=["sentence", "official", "clause", "window"],
        default="sentence",
        help="how captions are split",
    )
    parser.add_argument(
        "--long-segments",
        choices=["cut_further", "truncate"],
        default="cut_further",
        help="what becomes of a segment that does not fit the context",
    )
    parser.add_argument(
        "--weights-dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="what the text model computes in: the `dtype` of the model that the store is for",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float32",
        help="what is kept; float16: half the size, each number within 0.05 percent; bfloat16: "
        "half the size, exact after `--weights-dtype bfloat16`",
    )
    parser.add_argument(
        "--max-shard-megabytes", type=PositiveInt, default=256, help="size of a file of features"
    )
    parser.add_argument("--device", type=str, default="cpu", help="`cpu`, `cuda`, `cuda:1`, ...")
    return parser


def encode(options: Namespace) -> "StoreReport":
    """Run the sub-command.

    Raises:
        SegalignError: If the shards, the model or the store cannot be used.
    """
    from segalign.data.caption_stream import CaptionStream
    from segalign.data.loaders import open_shards
    from segalign.text.segmenters import build_segmenter, describe_segmenter
    from segalign.text.store_writer import StoreSettings, write_store

    captions = CaptionStream(open_shards(Path(options.shards)))
    segmenter = build_segmenter({"name": options.segmenter})
    settings = StoreSettings(
        segmenter=segmenter,
        segmenter_description=describe_segmenter(segmenter),
        long_segments=options.long_segments,
        dtype=options.dtype,
        max_shard_bytes=options.max_shard_megabytes * 10**6,
    )
    return write_store(captions, _load_tower(options), Path(options.store), settings)


def _load_tower(options: Namespace) -> "ClipTower":
    import torch
    from torch import nn

    from segalign.devices import choose_device
    from segalign.text.clip_tower import ClipTower

    device, dtype = choose_device(options.device), getattr(torch, options.weights_dtype)
    load = _scenes_tower if options.model == "scenes" else _folder_tower
    text_model, tokenizer = load(options)
    # The library's own `to` would log a warning at a change of precision.
    nn.Module.to(text_model.eval().requires_grad_(False), device=device, dtype=dtype)
    return ClipTower(text_model, tokenizer, layer=options.layer, cache_bytes=0)


def _scenes_tower(options: Namespace) -> "tuple[TextModel, CLIPTokenizer]":
    from segalign.scenes.base import ScenesBase

    if options.tower != 1:
        raise ConfigError("`--tower` must be 1 for `--model scenes`; got 2; leave it out")
    models = ScenesBase(generator="random").load().text_models
    return models.text_model, models.tokenizer


def _folder_tower(options: Namespace) -> "tuple[TextModel, CLIPTokenizer]":
    from segalign.diffusion.pretrained import read_second_text_tower, read_text_tower
    from segalign.hub import fetch

    number = "" if options.tower == 1 else "_2"
    parts = [f"text_encoder{number}", f"tokenizer{number}"]
    folder = fetch(options.model, what="the text-to-image model", parts=parts)
    return read_text_tower(folder) if options.tower == 1 else read_second_text_tower(folder)
