"""Read the captions of shards in manifest order, from any sample on, and nothing else of them."""

import zlib
from collections.abc import Iterator
from pathlib import Path

from segalign.data.captions import read_caption
from segalign.data.faults import SampleFault
from segalign.data.manifest import Manifest, ShardEntry
from segalign.data.reader import ShardFiles
from segalign.data.tarfiles import Member, Sample

_CAPTION_SUFFIXES = ("txt", "json")


class CaptionStream:
    """The captions of a folder of shards.

    Args:
        manifest: What the shards hold.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._files = ShardFiles(manifest.folder)

    @property
    def folder(self) -> Path:
        """Where the shards lie."""
        return self._manifest.folder

    @property
    def digest(self) -> str:
        """Hex id of the shards' content."""
        return self._manifest.digest

    def __len__(self) -> int:
        """Return the number of samples, faulty ones included."""
        return self._manifest.num_samples

    def read(self, start: int = 0) -> Iterator[str | SampleFault]:
        """Yield the caption of each sample from a sample id on, or why it has none."""
        for sample_id in range(start, len(self)):
            shard_number, place = self._manifest.locate(sample_id)
            sample = self._manifest.samples(shard_number)[place]
            try:
                yield self._caption(self._manifest.shards[shard_number], sample)
            except SampleFault as fault:
                yield fault

    def _caption(self, shard: ShardEntry, sample: Sample) -> str:
        members = {
            member.suffix: self._content(shard, member)
            for member in sample.members
            if member.suffix in _CAPTION_SUFFIXES
        }
        return read_caption(members)[0]

    def _content(self, shard: ShardEntry, member: Member) -> bytes:
        try:
            content = self._files.read(shard.name, member.offset, member.size)
        except OSError as error:
            raise SampleFault("read_error", str(error.strerror or error)) from error
        if len(content) != member.size or zlib.crc32(content) != member.crc32:
            detail = f"the bytes at {member.offset} are not those of the manifest"
            raise SampleFault("checksum", detail)
        return content
