import json

import pytest

from segalign.data.ledger import REPORT_NAME, Ledger, write_report
from segalign.errors import DataError


def fault(row: int, reason: str = "checksum"):
    return {
        "shard": "s.tar",
        "key": "k",
        "offset": 512,
        "reason": reason,
        "detail": "d",
        "row": row,
        "epoch": 0,
    }


def consume(ledger: Ledger, ids: list[int], epoch: int = 0, bad: tuple[int, ...] = ()) -> None:
    valid = [row not in bad for row in range(len(ids))]
    ledger.consume(ids, [epoch] * len(ids), valid, [fault(row) for row in bad])


def test_accounts_add_up():
    ledger = Ledger(10)
    consume(ledger, [3, 1, 4], bad=(1,))
    (epoch,) = ledger.report()["epochs"]
    assert epoch == {
        "epoch": 0,
        "delivered": 2,
        "quarantined": {"checksum": 1},
        "manifest": 10,
        "earlier": 0,
        "not_reached": 7,
    }
    ledger.check_identity()


def test_a_resumed_run_counts_what_came_earlier():
    ledger = Ledger(10, first_position=8)
    ledger.consume([5, 6, 0], [0, 0, 1], [True] * 3, [])
    first, second = ledger.report()["epochs"]
    assert (first["earlier"], first["delivered"], first["not_reached"]) == (8, 2, 0)
    assert (second["earlier"], second["delivered"], second["not_reached"]) == (0, 1, 9)
    ledger.check_identity()


def test_ranks_are_added():
    first, second = Ledger(4), Ledger(4)
    consume(first, [0, 1])
    consume(second, [2, 3], bad=(0,))
    total = first.merged([second])
    total.check_identity()
    assert (total.delivered, dict(total.quarantined)) == (3, {"checksum": 1})
    assert total.records == second.records


def test_padding_is_not_counted():
    ledger = Ledger(10)
    ledger.consume([0, -1], [0, 0], [True, False], [])
    assert ledger.report()["delivered"] == 1
    assert ledger.end_position == 1


def test_doubled_and_lost_samples_are_noticed():
    doubled = Ledger(4)
    consume(doubled, [0, 1, 1, 3])
    with pytest.raises(DataError, match="epoch 0 must account for 4 samples, each once; got 4, so"):
        doubled.check_identity()
    astray = Ledger(4)
    consume(astray, [0, 1, 2])
    consume(astray, [0], epoch=1)
    with pytest.raises(DataError, match="epoch 0 must account for 4 samples, each once; got 3;"):
        astray.check_identity()


def test_too_many_bad_samples_end_the_run():
    ledger = Ledger(1000)
    consume(ledger, list(range(295)), bad=(0, 1, 2, 3))
    ledger.check_bad_fraction(0.01, strict=False)
    consume(ledger, list(range(10)))
    message = (
        r"^at most 1.00% of the samples may be unreadable; 4 of 305 were, for example `s.tar` key "
        r"`k` at byte 512: checksum \(d\); run `shards verify --decode`, then mend the shards or "
        r"raise `max_bad_fraction`$"
    )
    with pytest.raises(DataError, match=message):
        ledger.check_bad_fraction(0.01, strict=False)
    ledger.check_bad_fraction(0.02, strict=False)


def test_strict_ends_at_the_first():
    ledger = Ledger(1000)
    consume(ledger, [0])
    ledger.check_bad_fraction(0.01, strict=True)
    consume(ledger, [1], bad=(0,))
    with pytest.raises(
        DataError, match=r"at most no sample \(`strict`\) may be unreadable; 1 of 2"
    ):
        ledger.check_bad_fraction(0.01, strict=True)


def test_report_is_written(tmp_path):
    ledger = Ledger(10)
    consume(ledger, [0, 1], bad=(1,))
    write_report(tmp_path, {"train": ledger})
    report = json.loads((tmp_path / REPORT_NAME).read_text())
    assert report["train"]["quarantined"] == {"checksum": 1}
    assert report["train"]["faults"] == [fault(1)]


def test_reports_of_other_stages_are_kept(tmp_path):
    write_report(tmp_path, {"train": Ledger(10)})
    write_report(tmp_path, {"validate": Ledger(5)})
    report = json.loads((tmp_path / REPORT_NAME).read_text())
    assert {stage: counts["manifest"] for stage, counts in report.items()} == {
        "train": 10,
        "validate": 5,
    }
