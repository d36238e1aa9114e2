"""Stream shards that have no manifest: endless, seeded, and with fewer promises.

The order depends on the numbers of ranks and workers, a resumed run does not continue where it
stopped, and nothing tells that samples are missing.
"""

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlparse

import webdataset
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander, url_opener

from segalign.data.manifest import MANIFEST_NAME
from segalign.data.order import BatchPlan, EpochOrder
from segalign.data.transforms import RESERVED, CollateRows, DecodeRow, RawSample
from segalign.errors import ConfigError, DataError

_SHUFFLE_BUFFER: Final = 1000
_logger = logging.getLogger(__name__)


def stream_urls(shards: str, *, allow_pipe: bool) -> list[str]:
    """List the shards of a folder, or those that a brace pattern or URL names.

    Raises:
        ConfigError: If a ``pipe:`` URL comes up that is not allowed, or there is a manifest.
        DataError: If there is none.
    """
    folder = Path(shards)
    if (folder / MANIFEST_NAME).exists():
        raise ConfigError(
            f"`samples_per_epoch` is for streams without a manifest; `{shards}` has one; "
            f"remove the setting"
        )
    if folder.is_dir():
        urls = [str(path) for path in sorted(folder.glob("[!.]*.tar"))]
    else:
        urls = list(webdataset.SimpleShardList(shards).urls)
    if any(urlparse(url).scheme == "pipe" for url in urls) and not allow_pipe:
        raise ConfigError(
            f"`pipe:` shards run shell commands and need `allow_pipe: true`; got `{shards}`; "
            f"set it if you trust this config"
        )
    if not urls:
        raise DataError(f"`{shards}` must name `*.tar` shards; it names none; check the path")
    return urls


class ShardStream(IterableDataset[RawSample]):
    """Yield raw samples from an endless chain of shard permutations.

    The streams of all workers of all ranks take the shards of the chain in turn.

    Args:
        urls: The shards.
        plan: Tells rank and batch sizes; only used to number epochs and streams.
        samples_per_epoch: Samples after which an epoch is counted, over all ranks.
        seed: Seed of the order.
        start: Number of the first micro-batch.
    """

    def __init__(
        self,
        urls: list[str],
        plan: BatchPlan,
        *,
        samples_per_epoch: int,
        seed: int = 0,
        start: int = 0,
    ) -> None:
        self._urls = urls
        self._plan = plan
        self._samples_per_epoch = samples_per_epoch
        self._seed = seed
        self._start = start

    def __iter__(self) -> Iterator[RawSample]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        stream = self._plan.global_rank * num_workers + worker
        num_streams = self._plan.world_size * num_workers
        samples = self._read(self._chain(stream, num_streams))
        seed = f"{self._seed}/{self._start}/{stream}"
        shuffled = webdataset.shuffle(_SHUFFLE_BUFFER, initial=100, seed=seed)(samples)
        yield from self._number(shuffled, worker, num_workers)

    def _chain(self, stream: int, num_streams: int) -> Iterator[str]:
        order = EpochOrder(
            [1] * len(self._urls), seed=self._seed + self._start, shuffle_window=len(self._urls)
        )
        position = stream
        while True:
            yield self._urls[order.locate(position)[1]]
            position += num_streams

    def _read(self, chain: Iterable[str]) -> Iterator[RawSample]:
        """Read shard after shard; those that cannot be read are logged and passed over.

        Raises:
            DataError: If every shard was tried since the last sample.
        """
        fruitless: dict[str, str] = {}
        for url in chain:
            if len(fruitless) == len(set(self._urls)):
                raise _no_samples(fruitless)
            errors: list[Exception] = []
            fruitless[url] = "it holds no samples"
            for sample in _read_shard(url, errors):
                fruitless.clear()
                yield sample
            if errors and url in fruitless:
                fruitless[url] = _first_line(errors[0])

    def _number(
        self, samples: Iterable[RawSample], worker: int, num_workers: int
    ) -> Iterator[RawSample]:
        """Give each sample an id from its shard and key, and the epoch it counts to."""
        size = self._plan.batch_size
        for count, sample in enumerate(samples):
            micro_batch = self._start + worker + count // size * num_workers
            position = self._plan.positions(micro_batch)[count % size]
            sample = {name: sample[name] for name in sample if _is_own(name)}
            sample["__position__"] = position
            sample["__index__"] = _stable_id(sample["__url__"], sample["__key__"])
            sample["__epoch__"] = position // self._samples_per_epoch
            yield sample


def stream_pipeline(
    stream: ShardStream, decode: DecodeRow, collate: CollateRows, batch_size: int
) -> webdataset.DataPipeline:
    """Chain stream, decoder and collation, and say what streaming cannot promise."""
    _logger.warning(
        "streaming shards without a manifest: the order depends on ranks and workers, a resumed "
        "run does not continue the sequence, and lost samples go unnoticed; "
        "`shards index` lifts all three"
    )
    return webdataset.DataPipeline(
        stream,
        webdataset.map(decode),
        webdataset.batched(batch_size, collation_fn=collate, partial=False),
    )


def _is_own(name: str) -> bool:
    """Tell whether a field is a member, or one that webdataset itself has set."""
    return not name.startswith(RESERVED) or name in ("__key__", "__url__")


def _stable_id(url: str, key: str) -> int:
    digest = hashlib.blake2b(f"{url}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _read_shard(url: str, errors: list[Exception]) -> Iterator[RawSample]:
    """Read one shard; what goes wrong is logged and added to ``errors``."""

    def log_and_continue(error: Exception) -> bool:
        _logger.warning("`%s` could not be read to its end: %s", url, _first_line(error))
        errors.append(error)
        return True

    for source in url_opener([{"url": url}], handler=log_and_continue):
        with contextlib.closing(source["stream"]):
            files = tar_file_expander([source], handler=log_and_continue)
            yield from group_by_keys(files, handler=log_and_continue)


def _no_samples(fruitless: Mapping[str, str]) -> DataError:
    url, reason = next(iter(fruitless.items()))
    return DataError(
        f"shards with samples were expected; none of {len(fruitless)} had any, the first, "
        f"`{url}`: {reason}; check `train_shards`"
    )


def _first_line(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return next(iter(reason.splitlines()), type(error).__name__)
