"""The kinds of sources that ``shards pack`` can pack: their arguments, and how they are opened."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from segalign.data.long_captions import LongCaptions
    from segalign.data.sources import Source

_PREFERENCE_FIELDS = (
    "JSONL file with `path_0`, `path_1`, `caption` and `preference_probs: [p0, p1]`, or `label`, "
    "the index of the preferred image (0.5 for a tie)"
)


class Kind(NamedTuple):
    """One kind of source.

    Attributes:
        help: One line about it.
        build_parser: Builds the parser of its arguments.
        open_source: Opens it by those arguments.
    """

    help: str
    build_parser: Callable[[], ArgumentParser]
    open_source: Callable[[Namespace], "Source"]


def _folder_parser() -> ArgumentParser:
    parser = ArgumentParser(description="each image has its caption in NAME.txt or NAME.json")
    parser.add_argument("source", type=str, help="folder of images; sub-folders are searched too")
    return with_packing(parser, images=True)


def _jsonl_parser() -> ArgumentParser:
    parser = ArgumentParser(description="`caption` and `path` on each line, or captions alone")
    parser.add_argument("source", type=str, help="JSONL file; other fields are kept as metadata")
    return _with_optional_images(parser)


def _with_optional_images(parser: ArgumentParser) -> ArgumentParser:
    parser.add_argument(
        "--image-root",
        type=str | None,
        help="folder that each `path` is relative to; without it captions alone are packed",
    )
    return with_packing(parser, images=True)


def _longalign_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="the LongAlign data set's own layout: Parquet with `path` and `caption`"
    )
    parser.add_argument(
        "source", type=str, help="Parquet file, folder of them or glob pattern; rows are streamed"
    )
    return _with_optional_images(parser)


def _preferences_parser() -> ArgumentParser:
    parser = ArgumentParser(description="two images, a caption and a preference on each line")
    parser.add_argument("source", type=str, help=_PREFERENCE_FIELDS)
    parser.add_argument(
        "--image-root", type=str, required=True, help="folder that the paths are relative to"
    )
    return with_packing(parser, images=True)


def _pickapic_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="the layout of Pick-a-Pic v1 and v2: Parquet with `jpg_0`, `jpg_1`, `label_0`, "
        "`label_1` and `caption`"
    )
    parser.add_argument(
        "source", type=str, help="Parquet file, folder of them or glob pattern; rows are streamed"
    )
    return with_packing(_with_preferences(parser, "ranking_id"), images=True)


def _hpd_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="the layout of HPDv2: a JSON array with `prompt`, `file_path` or `image_path`, "
        "and `human_preference` or `rank`"
    )
    parser.add_argument("source", type=str, help="JSON file; it is streamed")
    parser.add_argument(
        "--image-root", type=str, required=True, help="folder that the paths are relative to"
    )
    parser.add_argument(
        "--pairs",
        choices=["all", "adjacent"],
        default="all",
        help="of n ranked images: all pairs, or those of neighbours in rank",
    )
    return with_packing(_with_preferences(parser, "preferred_path"), images=True)


def _with_preferences(parser: ArgumentParser, key: str) -> ArgumentParser:
    parser.add_argument(
        "--captions",
        type=str | None,
        help='JSONL file of long captions that replace the prompts: {"id": ..., "caption": ...}',
    )
    parser.add_argument(
        "--caption-key", type=str, default=key, help="field of a pair that is the caption's id"
    )
    parser.add_argument(
        "--missing-captions",
        choices=["set_aside", "keep_prompt"],
        default="set_aside",
        help="what becomes of pairs without a long caption",
    )
    parser.add_argument(
        "--ties", choices=["keep", "set_aside"], default="keep", help="whether ties are packed"
    )
    return parser


def _scenes_parser() -> ArgumentParser:
    parser = ArgumentParser(description="pictures and captions drawn by this repository")
    parser.add_argument("--world", type=str, default="3x3", help="name of the world")
    parser.add_argument("--count", type=PositiveInt, default=1000, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0, help="names the stream of scenes")
    parser.add_argument("--start", type=NonNegativeInt, default=0, help="first scene of the stream")
    parser.add_argument(
        "--length",
        choices=["short", "long", "very_long"],
        default="long",
        help="length class of the captions",
    )
    parser.add_argument(
        "--pairs",
        action="store_true",
        help="preference pairs: the true picture, and one with one stated attribute changed",
    )
    parser.add_argument(
        "--edit-position",
        choices=["any", "past_77", "within_77"],
        default="any",
        help="where the caption states the changed attribute first; pairs only",
    )
    parser.add_argument(
        "--tie-share",
        type=ClosedUnitInterval,
        default=0.0,
        help="share of pairs whose two pictures are equal; pairs only",
    )
    return with_packing(parser, images=False)


def _generated_scenes_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="scenes of world `3x3`, a share of them drawn by the tiny base and captioned "
        "by what the oracle reads in them"
    )
    parser.add_argument("--count", type=PositiveInt, default=1000, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0, help="names the stream of scenes")
    parser.add_argument("--start", type=NonNegativeInt, default=0, help="first scene of the stream")
    parser.add_argument(
        "--share", type=ClosedUnitInterval, default=0.5, help="share that the tiny base draws"
    )
    parser.add_argument(
        "--length",
        choices=["short", "long", "very_long"],
        default="short",
        help="length class of the captions",
    )
    return with_packing(parser, images=False)


def with_packing(parser: ArgumentParser, *, images: bool) -> ArgumentParser:
    """Add the arguments that all packs have."""
    parser.add_argument("out", type=str, help="folder for the shards")
    parser.add_argument(
        "--samples-per-shard", type=PositiveInt, default=1000, help="samples of one shard"
    )
    parser.add_argument(
        "--num-processes", type=PositiveInt, default=1, help="processes that write shards"
    )
    if images:
        parser.add_argument(
            "--check",
            choices=["none", "header", "full"],
            default="header",
            help="how far each image is decoded; those that fail are set aside",
        )
    return parser


def _folder_source(options: Namespace) -> "Source":
    from segalign.data.sources import FolderSource

    return FolderSource(Path(options.source), check=options.check)


def _jsonl_source(options: Namespace) -> "Source":
    from segalign.data.jsonl_sources import JsonlSource

    root = None if options.image_root is None else Path(options.image_root)
    return JsonlSource(Path(options.source), image_root=root, check=options.check)


def _longalign_source(options: Namespace) -> "Source":
    from segalign.data.parquet_source import ParquetSource

    root = None if options.image_root is None else Path(options.image_root)
    return ParquetSource(options.source, image_root=root, check=options.check)


def _preference_source(options: Namespace) -> "Source":
    from segalign.data.jsonl_sources import PreferenceSource

    root = Path(options.image_root)
    return PreferenceSource(Path(options.source), image_root=root, check=options.check)


def _pickapic_source(options: Namespace) -> "Source":
    from segalign.data.pickapic_source import PickapicSource

    return PickapicSource(
        options.source, captions=_long_captions(options), ties=options.ties, check=options.check
    )


def _hpd_source(options: Namespace) -> "Source":
    from segalign.data.hpd_source import HpdSource

    return HpdSource(
        Path(options.source),
        image_root=Path(options.image_root),
        pairs=options.pairs,
        captions=_long_captions(options),
        ties=options.ties,
        check=options.check,
    )


def _long_captions(options: Namespace) -> "LongCaptions | None":
    from segalign.data.long_captions import LongCaptions

    if options.captions is None:
        return None
    return LongCaptions(
        Path(options.captions), key=options.caption_key, missing=options.missing_captions
    )


def _scene_source(options: Namespace) -> "Source":
    from segalign.data.scene_shards import SceneSource, pair_settings

    return SceneSource(
        options.world,
        options.count,
        seed=options.seed,
        start=options.start,
        length=options.length,
        pairs=pair_settings(
            pairs=options.pairs, edit_position=options.edit_position, tie_share=options.tie_share
        ),
    )


def _generated_scene_source(options: Namespace) -> "Source":
    from segalign.scenes.generated import GeneratedSceneSource

    return GeneratedSceneSource(
        options.count,
        seed=options.seed,
        start=options.start,
        share=options.share,
        length=options.length,
    )


KINDS: Final[Mapping[str, Kind]] = {
    "folder": Kind("images with captions beside them", _folder_parser, _folder_source),
    "jsonl": Kind("JSONL with captions and image paths", _jsonl_parser, _jsonl_source),
    "longalign": Kind("Parquet with captions and paths", _longalign_parser, _longalign_source),
    "preferences": Kind("JSONL of preference pairs", _preferences_parser, _preference_source),
    "pickapic": Kind("Parquet of Pick-a-Pic", _pickapic_parser, _pickapic_source),
    "hpd": Kind("JSON of HPDv2", _hpd_parser, _hpd_source),
    "scenes": Kind("scenes of the embedded benchmark", _scenes_parser, _scene_source),
    "generated-scenes": Kind(
        "scenes, a share drawn by the tiny base", _generated_scenes_parser, _generated_scene_source
    ),
}
