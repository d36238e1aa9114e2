import json

import pytest

from segalign.data.ledger import REPORT_NAME, Ledger, describe, write_report
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
        "position": row,
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
        "quarantined_by_shard": {"s.tar": 1},
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


def test_faults_are_kept_in_the_order_of_the_sequence_and_counted_to_the_last():
    one, other = Ledger(4000), Ledger(4000)
    for ledger, start in ((one, 0), (other, 1)):
        for position in range(start, 2400, 2):
            record = {**fault(0), "position": position}
            ledger.consume([position], [0], [False], [record])
    total = other.merged([one])
    assert [record["position"] for record in total.records] == list(range(1000))
    assert total.report()["faults_left_out"] == 1400
    assert total.report() == one.merged([other]).report()


def test_counting_goes_on_where_it_was_left():
    straight, first = Ledger(4), Ledger(4)
    for ledger in (straight, first):
        consume(ledger, [0, 1, 2], bad=(1,))
    state = json.loads(json.dumps(first.state()))
    second = Ledger.from_state(state)
    for ledger in (straight, second):
        consume(ledger, [3, 0], epoch=1, bad=(0,))
    assert second.report() == straight.report()
    assert second.state() == straight.state()


def test_what_is_said_of_a_fault_is_one_line_that_can_be_printed():
    record = {**fault(0), "key": "a\nb\x1b[31m\udc80" + 1000 * "x", "detail": "\u202e"}
    line = describe(record)
    assert line.isprintable()
    assert line.startswith(r"`s.tar` key `a\nb\x1b[31m\udc80xxx")
    assert len(line) < 400


@pytest.mark.parametrize("found", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_report_is_written_anew(tmp_path, found):
    (tmp_path / REPORT_NAME).write_bytes(found)
    write_report(tmp_path, {"train": Ledger(10)})
    assert json.loads((tmp_path / REPORT_NAME).read_text())["train"]["manifest"] == 10


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
