"""``stats compute | show``: statistics of real images, which FID and its kin compare with."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import PositiveInt

from segalign.commands.parsing import parse_arguments, summarise
from segalign.errors import ConfigError

if TYPE_CHECKING:
    from segalign.metrics.extractors.protocol import ExtractorSource, FeatureExtractor
    from segalign.metrics.reference_statistics import ReferenceStatistics

_EXTRACTORS: Final[Mapping[str, str]] = {
    "inception": "segalign.metrics.extractors.inception.InceptionV3",
    "tiny": "segalign.metrics.extractors.tiny.TinyExtractor",
}
_OWN_PACKAGE: Final = "segalign"


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    Raises:
        SegalignError: If the arguments do not fit or the command fails.
    """
    options = parse_arguments(build_parser(), argv, ["compute", "show"])
    if options.command == "compute":
        _compute(options.compute)
    else:
        _show(options.show)
    return 0


def build_parser() -> ArgumentParser:
    """Build the parser of the command's arguments."""
    parser = ArgumentParser(
        prog="main.py stats",
        description="statistics of real images, which FID and its kin compare with",
        exit_on_error=False,
    )
    commands = parser.add_subcommands(dest="command", metavar="compute | show")
    commands.add_subcommand(
        "compute", _compute_parser(), help="compute them, if they are not there"
    )
    commands.add_subcommand("show", _show_parser(), help="print what a file holds")
    return parser


def _compute_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="compute the statistics of the images of shards, and keep them"
    )
    add = parser.add_argument
    add("shards", type=str, help="shards with their manifest")
    add(
        "--extractor",
        type=str,
        required=True,
        help=f"{', '.join(f'`{name}`' for name in _EXTRACTORS)}, or the class path of another",
    )
    add(
        "--extractor_args",
        type=dict[str, Any],
        default={},
        help='its settings: `--extractor_args.weights FILE`, or as JSON {"weights": "FILE"}',
    )
    add("--image_size", type=PositiveInt | None, help="side of the images; default: their own")
    add("--count", type=PositiveInt | None, help="only the first so many samples")
    add("--batch_size", type=PositiveInt, default=32, help="images looked at at a time")
    add(
        "--sums_only",
        action="store_true",
        help="leave out the features themselves, which kernel distances (KID, CMMD) need",
    )
    add(
        "--grid_bits",
        type=PositiveInt,
        default=12,
        help="sums are of features rounded to multiples of 2^-grid_bits; lower it where features "
        "are too large to be summed exactly",
    )
    add("--out", type=str | None, help="file, .safetensors; default: in SHARDS/statistics")
    add("--device", type=str | None, help="such as cpu or cuda:1; default: a GPU if there is one")
    add(
        "--allow_import",
        type=str,
        action="append",
        default=[],
        help="package whose classes may be named too",
    )
    return parser


def _show_parser() -> ArgumentParser:
    parser = ArgumentParser(description="print the protocol of a file of statistics as JSON")
    parser.add_argument("file", type=str, help="file of `stats compute`")
    return parser


def _compute(options: Namespace) -> None:
    from segalign.data.loaders import open_shards
    from segalign.data.progress import show_progress
    from segalign.devices import choose_device
    from segalign.metrics.reference import FOLDER_NAME, keep_reference
    from segalign.metrics.reference_computing import ReferenceSettings
    from segalign.metrics.reference_files import check_file_name

    device = choose_device(options.device)
    out = None if options.out is None else check_file_name(Path(options.out))
    manifest = open_shards(Path(options.shards))
    source = read_extractor(options.extractor, options.extractor_args, options.allow_import)
    extractor = _load(source, options.extractor).to(device)
    total = min(options.count or manifest.num_samples, manifest.num_samples)
    with ExitStack() as stack:
        show = cache(lambda: stack.enter_context(show_progress("looking", total)))
        statistics, path, was_there = keep_reference(
            manifest,
            extractor,
            ReferenceSettings(
                image_size=options.image_size,
                count=options.count,
                batch_size=options.batch_size,
                keep_rows=not options.sums_only,
                grid_bits=options.grid_bits,
            ),
            device=device,
            folders=[Path(options.shards) / FOLDER_NAME],
            file=out,
            advance=lambda count: show()(count),
        )
    for name in statistics.protocol["images"]["left_out"]["samples"]:
        print(f"left out: {name}", file=sys.stderr)
    print(f"{'already there' if was_there else 'computed'}: {describe(statistics)}; see {path}")


def _load(source: "ExtractorSource", name: str) -> "FeatureExtractor":
    extractor: FeatureExtractor = source.load()
    if all(hasattr(extractor, part) for part in ("protocol", "num_features", "to")):
        return extractor
    raise ConfigError(
        f"expected an extractor of features; `{name}` loads a `{type(extractor).__name__}`, which "
        "is none; choose another"
    )


def _show(options: Namespace) -> None:
    from segalign.metrics.reference_files import load_reference

    statistics = load_reference(Path(options.file))
    print(describe(statistics))
    print(json.dumps(statistics.protocol, indent=2))


def describe(statistics: "ReferenceStatistics") -> str:
    """Say in one line what statistics hold."""
    images = statistics.protocol["images"]
    size = "their own size" if images["image_size"] is None else f"{images['image_size']} px"
    stored = ", ".join(f"{count:,} {suffix}" for suffix, count in images["stored"].items())
    rows = "sums alone" if statistics.rows is None else "sums and features of each"
    return (
        f"{images['num_images']:,} images at {size} ({stored}; "
        f"{images['left_out']['count']:,} left out), {rows}, "
        f"{statistics.statistics.num_features} features of "
        f"{statistics.protocol['extractor'].get('name', 'an unnamed extractor')}"
    )


def read_extractor(
    name: str, settings: Mapping[str, Any], allow_import: Sequence[str] = ()
) -> "ExtractorSource":
    """Make the settings of an extractor; nothing is read yet.

    Args:
        name: A short name, or the class path of an ``ExtractorSource``.
        settings: What its constructor takes; class paths in it are restricted too.
        allow_import: Packages besides this one whose classes may be named.

    Raises:
        ConfigError: If there is no such class, it may not be named, is no extractor, or does not
            take a setting.
    """
    from segalign.evaluation.image_metric import Source

    if "." not in name and name not in _EXTRACTORS:
        raise ConfigError(
            f"expected `--extractor` to be one of {', '.join(_EXTRACTORS)}, or a class path; got "
            f"`{name}`; choose one"
        )
    chosen = {"class_path": _EXTRACTORS.get(name, name), "init_args": dict(settings)}
    try:
        with _permitted(allow_import):
            parser = ArgumentParser(exit_on_error=False, add_help=False)
            parser.add_argument("--extractor", type=Source)
            read = parser.instantiate(parser.parse_object({"extractor": chosen}))
    except (ArgumentError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"expected the extractor `{name}` with settings it takes; got: "
            f"{summarise(str(error))} (see `python main.py stats compute --help`)"
        ) from error
    source: ExtractorSource = read.extractor
    return source


@contextmanager
def _permitted(allow_import: Sequence[str]) -> Iterator[None]:
    """Let arguments name classes of this package, and of others within a block."""
    extra = [name for name in allow_import if name != _OWN_PACKAGE]
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[_OWN_PACKAGE, *extra],
        instantiate_subclass_spec_in_any=False,
    )
    try:
        yield
    finally:
        if extra:
            set_parsing_settings(import_path_denylist=extra)
