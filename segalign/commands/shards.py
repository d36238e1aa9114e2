"""``shards pack | split | index | verify | encode``: make and check WebDataset shards."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from segalign.commands.encode import encode, encode_parser
from segalign.commands.pack_prompts import PROMPT_KINDS
from segalign.commands.pack_sources import KINDS
from segalign.commands.parsing import parse_arguments
from segalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from segalign.data.packing import PackReport
    from segalign.data.sources import Source

_COMMANDS = ("pack", "split", "index", "verify", "encode")
_KINDS = {**KINDS, **PROMPT_KINDS}


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0, or that of defects found.

    Raises:
        SegalignError: If the arguments do not fit or the command fails.
    """
    return _dispatch(parse_arguments(build_parser(), argv, _COMMANDS))


def build_parser() -> ArgumentParser:
    """Build the parser of the command's arguments."""
    parser = ArgumentParser(
        prog="main.py shards",
        description="make and check WebDataset shards",
        exit_on_error=False,
    )
    commands = parser.add_subcommands(dest="command", metavar=" | ".join(_COMMANDS))
    pack = ArgumentParser(
        description="pack samples into shards; a killed run goes on where it stopped"
    )
    commands.add_subcommand("pack", pack, help="make shards")
    kinds = pack.add_subcommands(dest="kind", metavar=" | ".join(_KINDS))
    for name, kind in _KINDS.items():
        kinds.add_subcommand(name, kind.build_parser(), help=kind.help)
    commands.add_subcommand("split", _split_parser(), help="set samples apart")
    commands.add_subcommand("index", _index_parser(), help="write the manifest of foreign shards")
    commands.add_subcommand("verify", _verify_parser(), help="check shards by their manifest")
    commands.add_subcommand("encode", encode_parser(), help="precompute text features")
    return parser


def _split_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="copy samples into shards of their own, to evaluate on; a killed run goes on "
        "where it stopped"
    )
    parser.add_argument("folder", type=str, help="shards and manifest; they stay as they are")
    parser.add_argument("out", type=str, help="folder for the chosen samples")
    parser.add_argument("--count", type=PositiveInt, default=5000, help="number of samples")
    parser.add_argument(
        "--choice",
        choices=["random", "first"],
        default="random",
        help="by seed and keys, or the first in manifest order",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of a random choice")
    parser.add_argument("--rest", type=str | None, help="folder for all others, to train on")
    parser.add_argument(
        "--samples-per-shard", type=PositiveInt, default=1000, help="samples of one shard"
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
    if command == "split":
        return _split(options.split)
    if command == "encode":
        _show({"features in": options.encode.store, **vars(encode(options.encode))})
        return 0
    kind = options.pack.kind
    return _pack(_KINDS[kind].open_source(options.pack[kind]), options.pack[kind])


def _pack(source: "Source", options: Namespace) -> int:
    from segalign.data.packing import pack

    report = pack(
        source,
        Path(options.out),
        samples_per_shard=options.samples_per_shard,
        num_processes=options.num_processes,
    )
    _show_report(options.out, report)
    return 0


def _split(options: Namespace) -> int:
    from segalign.data.loaders import open_shards
    from segalign.data.splitting import split_shards

    folders = [options.folder, options.out, *([options.rest] if options.rest else [])]
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ConfigError(
            f"expected different folders to read and to write; got {', '.join(folders)}; "
            "choose others"
        )
    reports = split_shards(
        open_shards(Path(options.folder)),
        Path(options.out),
        count=options.count,
        seed=options.seed,
        choice=options.choice,
        rest=None if options.rest is None else Path(options.rest),
        samples_per_shard=options.samples_per_shard,
    )
    for folder, report in zip(folders[1:], reports, strict=True):
        _show_report(folder, report)
    return 0


def _show_report(folder: str, report: "PackReport") -> None:
    rows = {"shards in": folder, **dataclasses.asdict(report)}
    if not report.preferences:
        del rows["preferences"]
    elif report.has_ties_only:
        rows["warning"] = "all pairs are ties, from which pairwise losses learn nothing"
    _show(rows)


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
            "next": f"`shards verify {folder} --decode` looks into captions and images",
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
