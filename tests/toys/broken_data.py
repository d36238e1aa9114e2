"""What reading and accounting would be without one of their parts."""

import numpy as np
from PIL import Image

from datamodules.long_caption import LongCaptionDataModule
from segalign.data import accounts, alarm, images, ledger, limits, reader, tarfiles


def crc_is_not_checked() -> None:
    """Takes whatever bytes lie where a member should be."""

    class Zlib:
        @staticmethod
        def crc32(_: bytes) -> "Anything":
            return Anything()

    class Anything:
        def __ne__(self, _: object) -> bool:
            return False

    reader.zlib = Zlib


def end_mark_is_not_checked() -> None:
    """Believes tarfile when it says that a tar has ended."""
    tarfiles._refuse_missing_end = lambda *_: None


def links_are_skipped() -> None:
    """Leaves members without content of their own out, as tar readers do."""
    tarfiles._refuse_without_content = lambda *_: None


def bombs_are_decoded() -> None:
    """Takes images of any size."""
    images.MAX_PIXELS = 10**12
    Image.MAX_IMAGE_PIXELS = None


def image_faults_are_filled_in() -> None:
    """Delivers a black image in place of one that cannot be decoded."""
    from segalign.data import transforms

    decode = transforms.decode_image

    def decode_or_fill(raw, size=None):
        try:
            return decode(raw, size)
        except transforms.SampleFault:
            return np.zeros((size, size, 3), dtype=np.uint8)

    transforms.decode_image = decode_or_fill


def members_may_have_any_name() -> None:
    """Lets a shard's member say that its sample is padding."""
    reader.RESERVED = "no name begins so"


def strict_is_ignored() -> None:
    """Goes on with whatever part of the samples."""
    limits.BadSampleLimits.find_excess = lambda *_: None


def faults_are_not_recorded() -> None:
    """Counts what is set aside, and does not say what it was."""
    ledger._first_records = lambda known, _: known


def padding_counts_as_delivered() -> None:
    """Takes the rows that only fill a batch for samples."""
    consume = ledger.Ledger.consume

    def consume_all(self, ids, epochs, valid, faults):
        faulty = {fault["row"] for fault in faults}
        consume(self, ids, epochs, [row not in faulty for row in range(len(ids))], faults)

    ledger.Ledger.consume = consume_all


def reads_are_counted() -> None:
    """Counts a batch when it is fetched, two batches before a step consumes it."""
    make = LongCaptionDataModule.train_dataloader
    begin = LongCaptionDataModule.consume

    def train_dataloader(self):
        loader = make(self)
        fetch = loader.__class__.__iter__

        def read_ahead(loader):
            waiting = []
            for batch in fetch(loader):
                begin(self, batch)
                waiting.append(batch)
                if len(waiting) > 2:
                    yield waiting.pop(0)

        loader.__class__ = type("Ahead", (loader.__class__,), {"__iter__": read_ahead})
        return loader

    LongCaptionDataModule.train_dataloader = train_dataloader
    LongCaptionDataModule.consume = lambda *_: None


def counts_are_not_stored() -> None:
    """Leaves the accounts out of checkpoints."""
    accounts.RunAccounts.state = lambda *_: {}


def steps_under_way_are_counted() -> None:
    """Stores and reports what was consumed, whether its step is whole or not."""
    settle = accounts.RunAccounts.settle
    accounts.RunAccounts.settle = lambda self, steps_taken=None: settle(self)


def each_rank_stores_its_own_counts() -> None:
    """Stores the accounts of rank 0 for those of all."""
    accounts.gather_stages = lambda stages: {name: each.merged([]) for name, each in stages.items()}


def all_ranks_take_the_counts() -> None:
    """Lets every rank go on from the counts of all of them."""
    accounts.own_rank = lambda: 0


def a_rank_ends_alone() -> None:
    """Raises an error on the rank that found it, and tells nobody."""

    def tell(self, error, step):
        raise error

    alarm.Alarm.tell = tell


def faults_shift_the_rows() -> None:
    """Leaves rows that are not valid out of what is counted, as a filter would."""
    consume = ledger.Ledger.consume

    def consume_valid(self, ids, epochs, valid, faults):
        kept = [row for row, is_valid in enumerate(valid) if is_valid]
        rows = [[column[row] for row in kept] for column in (ids, epochs, valid)]
        consume(self, *rows, [])

    ledger.Ledger.consume = consume_valid
