"""Pack a source into shards: in parallel, restartable, and the same bytes every time.

Which samples go into which shard is fixed before the start. A shard is written under a temporary
name, flushed, renamed, and then described in a side file; at the end the side files become the
manifest. A restart keeps the shards that have their side file and makes the others.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from segalign.atomic import make_directory, storage_errors, sync_directory, write_bytes_atomic
from segalign.data.faults import SampleFault
from segalign.data.manifest import (
    MANIFEST_NAME,
    format_index,
    load_manifest,
    parse_index,
    write_manifest,
)
from segalign.data.preferences import add_counts, count_preference
from segalign.data.processes import run_tasks
from segalign.data.progress import show_progress
from segalign.data.sources import Members, Source
from segalign.data.tarfiles import ShardIndex, ShardWriter
from segalign.errors import DataError

PLAN_NAME: Final = "pack.json"
REPORT_NAME: Final = "pack_report.json"
LOCK_SECONDS = 10.0
"""How long to wait for the processes of a killed pack, which end at their next report."""
_LOCK_NAME: Final = ".pack.lock"
_FORMAT_VERSION: Final = 1
_MAX_EXAMPLES: Final = 20
_SAMPLES_PER_REPORT: Final = 50


@dataclass(frozen=True)
class PackReport:
    """What became of the samples of a source.

    Attributes:
        num_source: Samples of the source.
        num_packed: Samples in the shards.
        num_shards: Shards.
        num_bytes: Bytes of all shards.
        set_aside: Number of samples left out, by reason.
        examples: The first samples left out: origin, reason, detail.
        preferences: Number of preference pairs and of ties among them; empty if there are none.
    """

    num_source: int
    num_packed: int
    num_shards: int
    num_bytes: int
    set_aside: dict[str, int]
    examples: list[list[str]]
    preferences: dict[str, int] = field(default_factory=dict)

    @property
    def has_ties_only(self) -> bool:
        """True if there are pairs and none of them says which image is preferred."""
        return bool(self.preferences) and self.preferences["pairs"] == self.preferences["ties"]


@dataclass(frozen=True)
class _ShardResult:
    index: ShardIndex
    set_aside: list[list[str]]
    preferences: dict[str, int]


def pack(
    source: Source,
    folder: Path,
    *,
    samples_per_shard: int = 1000,
    num_processes: int = 1,
    title: str = "packing",
) -> PackReport:
    """Pack all usable samples of a source into ``folder`` and write its manifest.

    Args:
        source: Where the samples come from.
        folder: Made if it is missing. It may hold an unfinished pack of the same source and
            settings, which is then finished, or a finished one, which is kept.
        samples_per_shard: Samples of one shard, faulty ones included, >= 1.
        num_processes: Processes that write shards.
        title: Shown with the progress.

    Raises:
        DataError: If the folder holds shards of another source or setting, is being packed by
            another process, or no sample is usable.
        StorageError: If the folder cannot be written.
    """
    make_directory(folder)
    try:
        with FileLock(folder / _LOCK_NAME, timeout=LOCK_SECONDS):
            return _pack_locked(source, folder, samples_per_shard, num_processes, title)
    except Timeout as err:
        raise DataError(
            f"`{folder}` must be packed by one process at a time; another is at work on it; "
            f"wait for it or choose another folder"
        ) from err


def _pack_locked(
    source: Source, folder: Path, samples_per_shard: int, num_processes: int, title: str
) -> PackReport:
    _settle_plan(source, folder, samples_per_shard)
    if (folder / MANIFEST_NAME).exists() and (folder / REPORT_NAME).exists():
        load_manifest(folder).check_files()
        return PackReport(**json.loads((folder / REPORT_NAME).read_bytes()))
    _remove_leftovers(folder)
    packer = _ShardPacker(source, folder, samples_per_shard)
    results = {
        number: result
        for number in range(packer.num_shards)
        if (result := _finished_shard(folder, number)) is not None
    }
    missing = [number for number in range(packer.num_shards) if number not in results]
    done = len(source) - sum(len(packer.share(number)) for number in missing)
    with show_progress(title, len(source), done=done) as advance:
        made = run_tasks(packer, missing, num_processes=num_processes, advance=advance)
        results.update(made)
    return _finish(folder, len(source), [results[number] for number in sorted(results)])


@dataclass(frozen=True)
class _ShardPacker:
    """Makes one shard; its bytes depend on source and number alone."""

    source: Source
    folder: Path
    samples_per_shard: int

    @property
    def num_shards(self) -> int:
        return -(-len(self.source) // self.samples_per_shard)

    def share(self, number: int) -> range:
        start = number * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, len(self.source)))

    def __call__(self, number: int, advance: Callable[[int], None]) -> tuple[int, _ShardResult]:
        path = self.folder / _shard_name(number)
        temporary = self.folder / f".{path.name}.tmp-{os.getpid()}"
        with storage_errors(path):
            with temporary.open("wb") as file:
                writer = ShardWriter(file, path.name)
                set_aside, preferences = self._write_samples(writer, number, advance)
                index = writer.finish()
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_directory(self.folder)
        result = _ShardResult(index, set_aside, preferences)
        write_bytes_atomic(_side_file(self.folder, number), _format_result(result))
        return number, result

    def _write_samples(
        self, writer: ShardWriter, number: int, advance: Callable[[int], None]
    ) -> tuple[list[list[str]], dict[str, int]]:
        set_aside = []
        preferences = []
        unreported = 0
        for position in self.share(number):
            try:
                members = self._read_source(position)
            except SampleFault as fault:
                set_aside.append([self.source.origin(position), fault.reason, fault.detail])
            else:
                writer.write(f"{position:09d}", members)
                preferences.append(count_preference(members))
            unreported += 1
            if unreported == _SAMPLES_PER_REPORT:
                advance(unreported)
                unreported = 0
        advance(unreported)
        return set_aside, add_counts(preferences)

    def _read_source(self, position: int) -> Members:
        try:
            return self.source.members(position)
        except OSError as err:
            raise DataError(
                f"the source must stay readable while it is packed; `{err.filename}`, "
                f"{self.source.origin(position)}: {err.strerror or err}; restore it and start again"
            ) from err


def _settle_plan(source: Source, folder: Path, samples_per_shard: int) -> None:
    """Write down what is packed here, or see that it is what was packed here before."""
    plan = {
        "format_version": _FORMAT_VERSION,
        "samples_per_shard": samples_per_shard,
        "num_source": len(source),
        **source.settings(),
    }
    path = folder / PLAN_NAME
    if path.exists():
        found = json.loads(path.read_bytes())
        changed = sorted(key for key in {*plan, *found} if plan.get(key) != found.get(key))
        if changed:
            raise DataError(
                f"`{folder}` holds shards packed with other settings; changed: "
                f"{', '.join(changed)}; choose another folder or delete it"
            )
        return
    foreign = sorted(folder.glob("*.tar"))
    if foreign or (folder / MANIFEST_NAME).exists():
        raise DataError(
            f"a folder without shards was expected; `{folder}` holds others; choose another folder"
        )
    write_bytes_atomic(path, json.dumps(plan, indent=2).encode() + b"\n")


def _finish(folder: Path, num_source: int, results: Sequence[_ShardResult]) -> PackReport:
    set_aside = [entry for result in results for entry in result.set_aside]
    report = PackReport(
        num_source=num_source,
        num_packed=sum(len(result.index.samples) for result in results),
        num_shards=sum(bool(result.index.samples) for result in results),
        num_bytes=sum(result.index.size for result in results if result.index.samples),
        set_aside=dict(sorted(Counter(reason for _, reason, _ in set_aside).items())),
        examples=set_aside[:_MAX_EXAMPLES],
        preferences=add_counts(result.preferences for result in results),
    )
    if not report.num_packed:
        origin, reason, detail = set_aside[0]
        raise DataError(
            f"at least one usable sample was expected; all {num_source} were set aside, the "
            f"first ({origin}) as {reason}: {detail}; mend the source"
        )
    write_bytes_atomic(folder / REPORT_NAME, _to_json(report.__dict__))
    for result in results:
        if not result.index.samples:
            (folder / result.index.name).unlink(missing_ok=True)
    write_manifest(folder, [result.index for result in results if result.index.samples])
    for number in range(len(results)):
        _side_file(folder, number).unlink(missing_ok=True)
    return report


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _side_file(folder: Path, number: int) -> Path:
    return folder / f".{_shard_name(number)}.json"


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left; shards in the making are hidden files."""
    with storage_errors(folder):
        for path in folder.glob(".*.tmp-*"):
            path.unlink(missing_ok=True)


def _finished_shard(folder: Path, number: int) -> _ShardResult | None:
    """Return what the side file says, if the shard is there as it says."""
    try:
        fields = json.loads(_side_file(folder, number).read_bytes())
        size = (folder / _shard_name(number)).stat().st_size
    except (FileNotFoundError, ValueError):
        return None
    if size != fields["size"]:
        return None
    samples = parse_index(json.dumps(fields["index"]).encode())
    index = ShardIndex(_shard_name(number), size, fields["sha256"], samples)
    return _ShardResult(index, fields["set_aside"], fields.get("preferences", {}))


def _format_result(result: _ShardResult) -> bytes:
    index = result.index
    return _to_json(
        {
            "size": index.size,
            "sha256": index.sha256,
            "index": json.loads(format_index(index)),
            "set_aside": result.set_aside,
            "preferences": result.preferences,
        }
    )


def _to_json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode() + b"\n"
