"""``direction estimate | report``: the common direction of a scorer's text features."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from segalign.commands.parsing import parse_arguments
from segalign.errors import ConfigError

if TYPE_CHECKING:
    from segalign.formats.clip_scorer import Scorer
    from segalign.rewards.segment_scorer import SegmentScorer
    from segalign.text.segmenter import Segmenter

SCENES = "scenes"


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    Raises:
        SegalignError: If the arguments do not fit or the command fails.
    """
    options = parse_arguments(build_parser(), argv, ["estimate", "report"])
    if options.command == "estimate":
        _estimate(options.estimate)
    else:
        _report(options.report)
    return 0


def build_parser() -> ArgumentParser:
    """Build the parser of the command's arguments."""
    parser = ArgumentParser(
        prog="main.py direction",
        description="the common direction of a scorer's text features",
        exit_on_error=False,
    )
    commands = parser.add_subcommands(dest="command", metavar="estimate | report")
    commands.add_subcommand("estimate", _estimate_parser(), help="estimate it from captions")
    commands.add_subcommand("report", _report_parser(), help="show what it does to scores")
    return parser


def _estimate_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="estimate the common direction from the captions of shards, of any number"
    )
    _add_common(parser)
    add = parser.add_argument
    add("--out", type=str, required=True, help="new file for the direction, .safetensors")
    add(
        "--text",
        choices=["segments", "whole"],
        default="segments",
        help="how the reward that uses it scores captions: the mean of segments, or whole, cut at "
        "the context",
    )
    add(
        "--segmenter",
        choices=["sentence", "official", "clause", "window"],
        help="how captions are split; default: sentence",
    )
    add("--limit", type=PositiveInt | None, help="read only the first so many samples")
    add("--batch-size", type=PositiveInt, default=64, help="captions embedded at a time")
    return parser


def _report_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="take the scores of captions and images apart along a direction; write "
        "report.md, shares.csv and direction.png"
    )
    _add_common(parser)
    add = parser.add_argument
    add("--direction", type=str, required=True, help="file of `direction estimate`")
    add("--out", type=str, required=True, help="folder for the report; an older one is replaced")
    add("--num-pairs", type=PositiveInt, default=512, help="samples to read")
    add("--num-shown", type=PositiveInt, default=20, help="pairs of the matrices in the picture")
    add("--batch-size", type=PositiveInt, default=32, help="pairs embedded at a time")
    return parser


def _add_common(parser: ArgumentParser) -> None:
    parser.add_argument("shards", type=str, help="shards with their manifest")
    parser.add_argument(
        "--scorer",
        type=str,
        required=True,
        help="CLIP-type model: local folder, hub id `owner/name`, or `scenes`; with "
        "`--architecture` a file of weights too",
    )
    parser.add_argument(
        "--architecture",
        type=str | None,
        help="`open_clip`'s name of weights in its own layout, such as ViT-H-14; a folder with "
        "open_clip_config.json needs none",
    )
    parser.add_argument(
        "--device", type=str | None, help="such as cpu or cuda:1; default: a GPU if there is one"
    )


def _estimate(options: Namespace) -> None:
    from segalign.atomic import make_directory
    from segalign.data.caption_stream import CaptionStream
    from segalign.data.loaders import open_shards
    from segalign.rewards.direction_estimation import (
        CaptionFeatures,
        check_corpus,
        estimate_direction,
    )
    from segalign.rewards.direction_report import counts_line, shares_line

    out = Path(options.out)
    if out.exists():
        raise ConfigError(
            f"expected a new file at `--out`; `{out}` is there; delete it or choose another name"
        )
    segmenter = _segmenter(options)
    captions = CaptionStream(open_shards(Path(options.shards)))
    make_directory(out.parent)
    check_corpus(captions.folder, min(len(captions), options.limit or len(captions)))
    features = CaptionFeatures(
        captions,
        _scorer(options, segmenter),
        batch_size=options.batch_size,
        limit=options.limit,
    )
    estimated = estimate_direction(features, options.scorer)
    estimated.for_use().save(out)
    facts = estimated.provenance
    rows = {
        "direction in": str(out),
        "scorer": f"{facts.model} ({facts.model_digest})",
        "text": facts.text,
        "captions": f"{facts.num_captions:,} ({facts.captions_digest})",
        "set aside": counts_line(estimated.set_aside),
        "|mean|": f"{estimated.mean_norm:.4f}",
        "common share": shares_line(estimated.shares),
    }
    for name, value in rows.items():
        print(f"{name:<12}  {value}")


def _report(options: Namespace) -> None:
    from segalign.atomic import make_directory, write_bytes_atomic, write_text_atomic
    from segalign.data.loaders import open_shards
    from segalign.rewards import direction_report
    from segalign.rewards.common_direction import CorpusDirection
    from segalign.rewards.direction_checks import (
        check_direction,
        described_segmenter,
        text_digest,
    )
    from segalign.rewards.direction_picture import draw_report

    if min(options.num_pairs, options.num_shown) < direction_report.MIN_PAIRS:
        raise ConfigError("expected at least 2 pairs and 2 shown; got 1; raise it")
    direction = CorpusDirection.load(Path(options.direction))
    manifest = open_shards(Path(options.shards))
    out = Path(options.out)
    make_directory(out)
    scorer = _scorer(options, described_segmenter(direction.provenance.text))
    check_direction(direction, text_digest(scorer), direction.provenance.text)
    pairs = direction_report.read_pairs(
        manifest, scorer, num_pairs=options.num_pairs, batch_size=options.batch_size
    )
    report = direction_report.take_apart(pairs, direction)
    page = direction_report.report_page(
        report, direction_file=options.direction, shards=options.shards
    )
    write_bytes_atomic(
        out / direction_report.PICTURE_NAME, draw_report(report, num_shown=options.num_shown)
    )
    write_text_atomic(out / "shares.csv", direction_report.shares_csv(report))
    write_text_atomic(out / "report.md", page)
    print(f"common share  {direction_report.shares_line(report.statistics)}")
    print(f"set aside     {direction_report.counts_line(report.set_aside)}\n")
    print(direction_report.scores_table(report))
    print(f"\nsee {out / 'report.md'}")


def _segmenter(options: Namespace) -> "Segmenter | None":
    from segalign.text.segmenters import build_segmenter

    if options.text == "segments":
        return build_segmenter({"name": options.segmenter or "sentence"})
    if options.segmenter is not None:
        raise ConfigError(
            "expected no `--segmenter` with `--text whole`, which splits nothing; got "
            f"`{options.segmenter}`; leave it out"
        )
    return None


def _scorer(options: Namespace, segmenter: "Segmenter | None") -> "SegmentScorer":
    from segalign.devices import choose_device
    from segalign.rewards.segment_scorer import SegmentScorer

    device = choose_device(options.device)
    scorer = SegmentScorer(_load(options), segmenter=segmenter).to(device)
    return scorer.requires_grad_(False).eval()


def _load(options: Namespace) -> "Scorer":
    """Read the scorer: that of the benchmark, one of ``open_clip``, or a ``CLIPModel``."""
    from segalign.formats.clip_scorer import load_clip_scorer
    from segalign.formats.open_clip_scorer import load_open_clip_scorer
    from segalign.scenes.scorers import ScenesScorer

    if options.scorer == SCENES:
        return ScenesScorer().load()
    is_open_clip = (Path(options.scorer).expanduser() / "open_clip_config.json").is_file()
    if options.architecture is not None or is_open_clip:
        return load_open_clip_scorer(options.scorer, architecture=options.architecture)
    return load_clip_scorer(options.scorer)
