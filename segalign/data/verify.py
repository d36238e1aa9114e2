"""Check a folder of shards against its manifest, and its samples by decoding them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from segalign.data.captions import parse_preference, read_caption
from segalign.data.faults import SampleFault
from segalign.data.images import IMAGE_SUFFIXES, decode_image
from segalign.data.manifest import Manifest, ShardEntry, load_manifest
from segalign.data.tarfiles import Sample, ShardIndex, index_shard
from segalign.errors import DataError

_MAX_EXAMPLES = 20


@dataclass
class VerifyReport:
    """What a check found.

    Attributes:
        folder: What was checked.
        num_shards: Shards of the manifest.
        num_samples: Samples of the manifest.
        num_decoded: Samples that were decoded.
        shard_defects: One line for each defect of a shard.
        sample_defects: Number of faulty samples, by reason.
        examples: The first faulty samples: shard, key, reason, detail.
    """

    folder: str
    num_shards: int = 0
    num_samples: int = 0
    num_decoded: int = 0
    shard_defects: list[str] = field(default_factory=list)
    sample_defects: Counter[str] = field(default_factory=Counter)
    examples: list[list[str]] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """True if there is no defect."""
        return not self.shard_defects and not self.sample_defects


def verify_shards(
    folder: Path, *, decode: bool = False, advance: Callable[[int], None] = lambda _: None
) -> VerifyReport:
    """Compare every shard with the manifest: size, digest, keys, offsets and checksums.

    Args:
        folder: Shards and manifest.
        decode: Decode captions and images too.
        advance: Told how many more samples are done.

    Raises:
        DataError: If the manifest itself cannot be read.
    """
    manifest = load_manifest(folder)
    report = VerifyReport(str(folder), len(manifest.shards), manifest.num_samples)
    listed = {shard.name for shard in manifest.shards}
    for path in sorted(folder.glob("[!.]*.tar")):
        if path.name not in listed:
            report.shard_defects.append(f"`{path.name}` is not in the manifest")
    for number, shard in enumerate(manifest.shards):
        index = _check_shard(manifest, number, shard, report)
        if decode and index is not None:
            _check_samples(folder / shard.name, index, report)
        advance(shard.num_samples)
    return report


def _check_shard(
    manifest: Manifest, number: int, shard: ShardEntry, report: VerifyReport
) -> ShardIndex | None:
    path = manifest.folder / shard.name
    if not path.is_file():
        report.shard_defects.append(f"`{shard.name}` is missing")
        return None
    try:
        index = index_shard(path)
        expected = manifest.samples(number)
    except DataError as err:
        report.shard_defects.append(str(err))
        return None
    if index.size != shard.size:
        report.shard_defects.append(f"`{shard.name}` has {index.size} bytes, not {shard.size}")
    elif index.sha256 != shard.sha256:
        report.shard_defects.append(f"`{shard.name}` has another digest than the manifest says")
    if index.samples != expected or len(expected) != shard.num_samples:
        report.shard_defects.append(
            f"`{shard.name}` holds {len(index.samples)} samples; the manifest's "
            f"{shard.num_samples} are not all there as listed"
        )
    return index


def _check_samples(path: Path, index: ShardIndex, report: VerifyReport) -> None:
    with path.open("rb") as file:
        for sample in index.samples:
            members = {}
            for suffix, offset, size, _ in sample.members:
                file.seek(offset)
                members[suffix] = file.read(size)
            report.num_decoded += 1
            try:
                decode_members(members)
            except SampleFault as fault:
                _add(report, path, sample, fault)


def decode_members(members: dict[str, bytes]) -> None:
    """Decode all that a sample holds: caption, images, preference.

    Raises:
        SampleFault: At the first that cannot be used.
    """
    _, metadata = read_caption(members)
    images = [suffix for suffix in members if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
    for suffix in images:
        decode_image(members[suffix])
    places = sorted(suffix[0] for suffix in images if suffix.startswith(("0.", "1.")))
    if places:
        if places != ["0", "1"]:
            raise SampleFault("image_missing", f"a pair needs the images 0 and 1, got {places}")
        parse_preference(metadata)


def _add(report: VerifyReport, path: Path, sample: Sample, fault: SampleFault) -> None:
    report.sample_defects[fault.reason] += 1
    if len(report.examples) < _MAX_EXAMPLES:
        report.examples.append([path.name, sample.key, fault.reason, fault.detail])
