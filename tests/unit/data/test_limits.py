import pytest

from segalign.data.ledger import Ledger
from segalign.data.limits import BadSampleLimits

FAULT = {
    "shard": "s.tar",
    "key": "k",
    "offset": 512,
    "reason": "checksum",
    "detail": "d",
    "row": 0,
    "epoch": 0,
    "position": 0,
}


def consume(ledger: Ledger, *, good: int = 0, bad: int = 0, epoch: int = 0) -> None:
    valid = [False] * bad + [True] * good
    faults = [{**FAULT, "row": row, "epoch": epoch, "position": row} for row in range(bad)]
    ledger.consume(list(range(len(valid))), [epoch] * len(valid), valid, faults)


def test_too_many_bad_samples_end_the_run():
    ledger = Ledger(1000)
    consume(ledger, bad=3, good=297)
    assert BadSampleLimits().find_excess(ledger, {}) is None
    consume(ledger, bad=1, good=4)
    assert str(BadSampleLimits().find_excess(ledger, {})) == (
        "at most 1.00% of the samples may be unreadable; 4 of 305 were, for example `s.tar` key "
        "`k` at byte 512: checksum (d); run `shards verify --decode`, then mend the shard (if it "
        "was replaced on purpose: `shards index --force`), or raise `max_bad_fraction`"
    )
    assert BadSampleLimits(max_bad_fraction=0.02).find_excess(ledger, {}) is None


@pytest.mark.parametrize(
    ("bad", "good", "fraction", "is_too_much"),
    [(3, 5, 0.01, False), (4, 4, 0.01, True), (1, 0, 0.0, True), (30, 0, 0.1, False),
     (31, 0, 0.1, True), (4, 396, 0.01, False), (5, 395, 0.01, True)],
)  # fmt: skip
def test_of_few_samples_some_may_be_bad(bad, good, fraction, is_too_much):
    ledger = Ledger(1000)
    consume(ledger, bad=bad, good=good)
    limits = BadSampleLimits(max_bad_fraction=fraction)
    assert (limits.find_excess(ledger, {}) is not None) == is_too_much


def test_strict_ends_at_the_first():
    ledger = Ledger(1000)
    consume(ledger, good=1)
    assert BadSampleLimits(strict=True).find_excess(ledger, {}) is None
    consume(ledger, bad=1)
    found = str(BadSampleLimits(strict=True).find_excess(ledger, {}))
    assert found.startswith("at most no sample (`strict`) may be unreadable; 1 of 2 were, for ex")
    assert found.endswith("index --force`), or leave `strict` out")


def test_only_who_may_have_replaced_a_shard_is_told_how_to_index_it():
    ledger = Ledger(1000)
    ledger.consume([0], [0], [False], [{**FAULT, "reason": "image_missing"}])
    found = str(BadSampleLimits(strict=True).find_excess(ledger, {}))
    assert found.endswith("then mend the shard, or leave `strict` out")


@pytest.mark.parametrize(
    ("size", "bad", "fraction", "is_too_much"),
    [(100, 5, 0.05, False), (100, 6, 0.05, True), (19, 19, 0.05, False), (20, 2, 0.05, True),
     (20, 20, 1.0, False), (20, 1, 0.0, True)],
)  # fmt: skip
def test_one_shard_that_is_bad_ends_the_run(size, bad, fraction, is_too_much):
    ledger = Ledger(100_000)
    consume(ledger, bad=bad, good=50)
    limits = BadSampleLimits(max_bad_fraction=1.0, max_bad_shard_fraction=fraction)
    found = limits.find_excess(ledger, {"s.tar": size})
    assert (found is not None) == is_too_much
    if is_too_much:
        assert f"{bad} of the {size} samples of `s.tar` were, for example `s.tar` key" in str(found)


def test_shards_are_judged_by_the_epoch():
    ledger = Ledger(1000)
    for epoch in range(10):
        consume(ledger, bad=5, good=20, epoch=epoch)
    limits = BadSampleLimits(max_bad_fraction=1.0)
    assert limits.find_excess(ledger, {"s.tar": 100}) is None
    consume(ledger, bad=1, epoch=3)
    assert limits.find_excess(ledger, {"s.tar": 100}) is not None
    assert limits.find_excess(ledger, {"s.tar": 100}, epochs={2, 4, 77}) is None
