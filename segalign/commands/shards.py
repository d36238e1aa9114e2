"""``shards pack | index | verify | encode``: make and check WebDataset shards."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from segalign.commands.encode import encode, encode_parser
from segalign.commands.parsing import parse_arguments
from segalign.errors import DataError

if TYPE_CHECKING:
    from segalign.data.sources import Source

_PREFERENCE_FIELDS = (
    "JSONL file with `path_0`, `path_1`, `caption` and `preference_probs: [p0, p1]`, or `label`, "
    "the index of the preferred image (0.5 for a tie)"
)


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0, or that of defects found.

    Raises:
        SegalignError: If the arguments do not fit or the command fails.
    """
    return _dispatch(parse_arguments(build_parser(), argv, ["pack", "index", "verify", "encode"]))


def build_parser() -> ArgumentParser:
    """Build the parser of the command's arguments."""
    parser = ArgumentParser(
        prog="main.py shards",
        description="make and check WebDataset shards",
        exit_on_error=False,
    )
    commands = parser.add_subcommands(dest="command", metavar="pack | index | verify | encode")
    pack = ArgumentParser(
        description="pack samples into shards; a killed run goes on where it stopped"
    )
    commands.add_subcommand("pack", pack, help="make shards")
    kinds = pack.add_subcommands(dest="kind", metavar=" | ".join(_SOURCES))
    kinds.add_subcommand("folder", _folder_parser(), help="images with captions beside them")
    kinds.add_subcommand("jsonl", _jsonl_parser(), help="JSONL with captions and image paths")
    kinds.add_subcommand("longalign", _longalign_parser(), help="Parquet with captions and paths")
    kinds.add_subcommand("preferences", _preferences_parser(), help="JSONL of preference pairs")
    kinds.add_subcommand("scenes", _scenes_parser(), help="scenes of the embedded benchmark")
    commands.add_subcommand("index", _index_parser(), help="write the manifest of foreign shards")
    commands.add_subcommand("verify", _verify_parser(), help="check shards by their manifest")
    commands.add_subcommand("encode", encode_parser(), help="precompute text features")
    return parser


def _folder_parser() -> ArgumentParser:
    parser = ArgumentParser(description="each image has its caption in NAME.txt or NAME.json")
    parser.add_argument("source", type=str, help="folder of images; sub-folders are searched too")
    return _with_packing(parser, images=True)


def _jsonl_parser() -> ArgumentParser:
    parser = ArgumentParser(description="`caption` and `path` on each line, or captions alone")
    parser.add_argument("source", type=str, help="JSONL file; other fields are kept as metadata")
    parser.add_argument(
        "--image-root",
        type=str | None,
        help="folder that each `path` is relative to; without it captions alone are packed",
    )
    return _with_packing(parser, images=True)


def _longalign_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="the LongAlign data set's own layout: Parquet with `path` and `caption`"
    )
    parser.add_argument(
        "source", type=str, help="Parquet file, folder of them or glob pattern; rows are streamed"
    )
    parser.add_argument(
        "--image-root",
        type=str | None,
        help="folder that each `path` is relative to; without it captions alone are packed",
    )
    return _with_packing(parser, images=True)


def _preferences_parser() -> ArgumentParser:
    parser = ArgumentParser(description="two images, a caption and a preference on each line")
    parser.add_argument("source", type=str, help=_PREFERENCE_FIELDS)
    parser.add_argument(
        "--image-root", type=str, required=True, help="folder that the paths are relative to"
    )
    return _with_packing(parser, images=True)


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
    return _with_packing(parser, images=False)


def _with_packing(parser: ArgumentParser, *, images: bool) -> ArgumentParser:
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


def _index_parser() -> ArgumentParser:
    parser = ArgumentParser(description="write the manifest of shards that others have made")
    parser.add_argument("folder", type=str, help="plain tars, members of one key side by side")
    parser.add_argument("--force", action="store_true", help="replace a manifest that is there")
    parser.add_argument("--num-threads", type=PositiveInt, default=2, help="shards read at a time")
    return parser


def _verify_parser() -> ArgumentParser:
    parser = ArgumentParser(description="exit code 65 if there is a defect")
    parser.add_argument("folder", type=str, help="shards and manifest")
    parser.add_argument("--decode", action="store_true", help="decode captions and images too")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _dispatch(options: Namespace) -> int:
    command = options.command
    if command == "index":
        return _index(options.index)
    if command == "verify":
        return _verify(options.verify)
    if command == "encode":
        _show({"features in": options.encode.store, **vars(encode(options.encode))})
        return 0
    kind = options.pack.kind
    return _pack(_SOURCES[kind](options.pack[kind]), options.pack[kind])


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


def _scene_source(options: Namespace) -> "Source":
    from segalign.data.scene_shards import SceneSource

    return SceneSource(
        options.world,
        options.count,
        seed=options.seed,
        start=options.start,
        length=options.length,
    )


_SOURCES: Mapping[str, Callable[[Namespace], "Source"]] = {
    "folder": _folder_source,
    "jsonl": _jsonl_source,
    "longalign": _longalign_source,
    "preferences": _preference_source,
    "scenes": _scene_source,
}


def _pack(source: "Source", options: Namespace) -> int:
    from segalign.data.packing import pack

    report = pack(
        source,
        Path(options.out),
        samples_per_shard=options.samples_per_shard,
        num_processes=options.num_processes,
    )
    _show({"shards in": options.out, **dataclasses.asdict(report)})
    return 0


def _index(options: Namespace) -> int:
    from segalign.data.manifest import MANIFEST_NAME, index_shards

    folder = Path(options.folder)
    if (folder / MANIFEST_NAME).exists() and not options.force:
        raise DataError(
            f"a folder without a manifest was expected; `{folder}` has one; check it with "
            f"`shards verify`, or replace it with `--force`"
        )
    manifest = index_shards(folder, num_threads=options.num_threads)
    _show(
        {
            "shards": len(manifest.shards),
            "samples": manifest.num_samples,
            "manifest": str(folder / MANIFEST_NAME),
            "digest": manifest.digest,
        }
    )
    return 0


def _verify(options: Namespace) -> int:
    from segalign.data.manifest import load_manifest
    from segalign.data.progress import show_progress
    from segalign.data.verify import verify_shards

    folder = Path(options.folder)
    with show_progress("verifying", load_manifest(folder).num_samples) as advance:
        report = verify_shards(folder, decode=options.decode, advance=advance)
    rows: dict[str, Any] = {**dataclasses.asdict(report), "sound": report.is_sound}
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        _show(rows)
    return 0 if report.is_sound else DataError.exit_code


def _show(rows: Mapping[str, object]) -> None:
    """Print a table of names and values; lists and counts one entry a line."""
    width = max(map(len, rows))
    for name, value in rows.items():
        lines = _lines(value)
        print(f"{name.replace('_', ' '):<{width}}  {lines[0]}")
        for line in lines[1:]:
            print(f"{'':<{width}}  {line}")


def _lines(value: object) -> list[str]:
    if isinstance(value, Mapping):
        return [f"{name}: {count}" for name, count in value.items()] or ["none"]
    if isinstance(value, list):
        return [
            " | ".join(entry) if isinstance(entry, list) else str(entry) for entry in value
        ] or ["none"]
    return [f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)]
