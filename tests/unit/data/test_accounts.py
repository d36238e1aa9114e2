import json
from datetime import timedelta

import pytest
import torch
from torch import distributed

from segalign.data import accounts as module
from segalign.data import alarm as alarms
from segalign.data.accounts import RunAccounts
from segalign.data.alarm import Alarm
from segalign.data.ledger import REPORT_NAME, Ledger
from segalign.data.limits import BadSampleLimits
from segalign.errors import DataError


def batch(ids: list[int], bad: tuple[int, ...] = (), epoch: int = 0):
    faults = [
        {
            "shard": "shard-000000.tar",
            "key": str(ids[row]),
            "offset": 512,
            "reason": "checksum",
            "detail": "d",
            "row": row,
            "epoch": epoch,
            "position": ids[row],
        }
        for row in bad
    ]
    return {
        "sample_ids": torch.tensor(ids),
        "epochs": torch.tensor([epoch] * len(ids)),
        "valid": torch.tensor([row not in bad for row in range(len(ids))]),
        "faults": faults,
    }


@pytest.fixture
def two_ranks(monkeypatch):
    """Two ranks as far as alarms see: a store, and a rank that changes."""
    store = distributed.HashStore()
    store.set_timeout(timedelta(seconds=1))
    monkeypatch.setattr(alarms, "_store", lambda: store)
    monkeypatch.setattr(alarms, "world_size", lambda: 2)
    monkeypatch.setattr(alarms, "is_distributed", lambda: True)
    return Alarm(), Alarm()


def test_all_ranks_raise_at_the_step_after_the_one_that_told(two_ranks):
    first, second = two_ranks
    for alarm in two_ranks:
        alarm.silence()
        alarm.raise_if_told(3)
    first.tell(DataError("too much"), 3)
    first.raise_if_told(3)
    second.raise_if_told(3)  # another micro-batch of the same step
    for alarm in two_ranks:
        with pytest.raises(DataError, match=r"^too much$") as caught:
            alarm.raise_if_told(4)
        assert alarm.has_raised(caught.value)
    second.silence()
    second.raise_if_told(4)


def test_the_first_of_two_that_tell_is_heard_by_all(two_ranks):
    first, second = two_ranks
    first.tell(DataError("one"), 3)
    second.tell(DataError("other"), 3)
    for alarm in two_ranks:
        with pytest.raises(DataError, match=r"^one$"):
            alarm.raise_if_told(4)


def test_who_hears_it_early_waits_for_its_step(two_ranks):
    first, second = two_ranks
    first.tell(DataError("too much"), 4)
    second.raise_if_told(4)
    with pytest.raises(DataError, match="too much"):
        second.raise_if_told(5)


def test_alone_it_is_raised_at_once():
    alarm = Alarm()
    alarm.silence()
    with pytest.raises(DataError, match="too much") as caught:
        alarm.tell(DataError("too much"), 4)
    assert alarm.has_raised(caught.value)
    assert not alarm.has_raised(DataError("too much"))


def open_accounts(manifest, limits=None) -> RunAccounts:
    accounts = RunAccounts(BadSampleLimits(1.0, 1.0) if limits is None else limits)
    accounts.begin()
    accounts.expect("train", manifest)
    accounts.begin_training(0, None)
    return accounts


def test_what_is_too_much_over_all_ranks_is_raised_after_a_checkpoint(
    tmp_path, write_shards, monkeypatch
):
    accounts = open_accounts(write_shards(tmp_path, [40]), BadSampleLimits())
    other = Ledger(40)
    other.consume([4, 5], [0, 0], [False, True], batch([4, 5], bad=(0,))["faults"])
    monkeypatch.setattr(
        module,
        "gather_stages",
        lambda stages: {name: ledger.merged([other]) for name, ledger in stages.items()},
    )
    accounts.consume(batch([0, 1, 2], bad=(0, 1)), "train", 0)
    kept = accounts.state(1)["train"]
    assert kept["epochs"] == [[0, 2, 12, {"checksum": 3}, {"shard-000000.tar": 3}]]
    with pytest.raises(DataError, match=r"3 of the 40 samples of `shard-000000.tar` were, for"):
        accounts.consume(batch([6]), "train", 1)


def test_ranks_but_the_first_count_from_nothing_after_a_checkpoint(
    tmp_path, write_shards, monkeypatch
):
    accounts = open_accounts(write_shards(tmp_path, [6]))
    accounts.consume(batch([0, 1]), "train", 0)
    monkeypatch.setattr(module, "own_rank", lambda: 1)
    assert accounts.state(1)["train"]["epochs"] == [[0, 2, 1, {}, {}]]
    assert accounts.stages["train"].delivered == 0
    accounts.consume(batch([2, 3]), "train", 1)
    assert accounts.stages["train"].delivered == 2


def test_a_pass_begins_where_ids_do_not_ascend(tmp_path, write_shards):
    accounts = open_accounts(write_shards(tmp_path, [6]))
    for ids in ([0, 1], [2, -1], [-1, -1], [0, 1], [2, 3]):
        padding = tuple(row for row, number in enumerate(ids) if number == -1)
        rows = batch(ids)
        rows["valid"][list(padding)] = False
        accounts.consume(rows, "validate", 0)
    assert accounts.stages["validate"].delivered == 4
    accounts.consume(batch([0]), "validate", 0)
    assert accounts.stages["validate"].delivered == 1


def test_a_report_that_cannot_be_written_hides_no_error(tmp_path, write_shards, caplog):
    accounts = open_accounts(write_shards(tmp_path, [6]))
    (tmp_path / "file").touch()
    accounts.close_after(RuntimeError("the first"), tmp_path / "file" / "run")
    assert "no report of the data" in caplog.text


def test_what_was_reported_is_not_reported_anew(tmp_path, write_shards):
    accounts = open_accounts(write_shards(tmp_path, [6]))
    accounts.consume(batch([0, 0, 1, 2, 3, 4]), "train", 0)
    with pytest.raises(DataError, match="some of them twice") as caught:
        accounts.close(tmp_path, 6)
    (tmp_path / REPORT_NAME).write_text(json.dumps({"kept": 1}))
    accounts.close_after(caught.value, tmp_path)
    assert json.loads((tmp_path / REPORT_NAME).read_text()) == {"kept": 1}


def test_a_checkpoint_keeps_whole_steps(tmp_path, write_shards):
    manifest = write_shards(tmp_path, [40])
    accounts = open_accounts(manifest)
    for number in range(5):
        first = 4 * number
        bad = (1,) if number in (0, 4) else ()
        accounts.consume(batch([*range(first, first + 4)], bad), "train", number // 2)
    kept = accounts.state(2)["train"]
    assert kept["epochs"] == [[0, 15, 120, {"checksum": 1}, {"shard-000000.tar": 1}]]
    assert [fault["position"] for fault in kept["faults"]] == [1]
    # The step may go on, be it with several checkpoints in it.
    assert accounts.state(2)["train"] == kept
    accounts.consume(batch([*range(20, 24)]), "train", 2)
    whole = accounts.state(3)["train"]
    assert whole["epochs"] == [[0, 22, 276, {"checksum": 2}, {"shard-000000.tar": 2}]]

    resumed = RunAccounts(BadSampleLimits(1.0, 1.0))
    resumed.begin()
    resumed.expect("train", manifest)
    resumed.begin_training(16, {"train": kept})
    resumed.consume(batch([*range(16, 20)], (1,)), "train", 2)
    resumed.consume(batch([*range(20, 24)]), "train", 2)
    assert resumed.state(3)["train"] == whole


def test_an_error_reports_the_step_under_way_too(tmp_path, write_shards):
    accounts = open_accounts(write_shards(tmp_path, [40]), BadSampleLimits(0.0, 0.0, True))
    accounts.consume(batch([0, 1]), "train", 0)
    with pytest.raises(DataError, match="strict") as caught:
        accounts.consume(batch([2, 3], (0,)), "train", 0)
    accounts.close_after(caught.value, tmp_path)
    report = json.loads((tmp_path / REPORT_NAME).read_text())["train"]
    assert (report["delivered"], report["quarantined"]) == (3, {"checksum": 1})


def test_a_pass_after_the_checkpoint_is_taken_over_unless_it_makes_no_sense(tmp_path, write_shards):
    manifest = write_shards(tmp_path, [40])
    accounts = open_accounts(manifest)
    accounts.consume(batch([0, 1]), "train", 0)
    kept = accounts.state(1)
    accounts.consume(batch([0, 1, 2], (1,)), "validate", 1)
    later = json.loads(json.dumps(accounts.passes()))
    assert list(later) == ["validate"]
    assert accounts.stages["validate"].delivered == 2

    def resume(passes):
        resumed = RunAccounts(BadSampleLimits(1.0, 1.0))
        resumed.begin()
        resumed.expect("train", manifest)
        resumed.take_passes(passes)
        resumed.begin_training(2, kept)
        return resumed.state(1)

    assert resume(later) == {**kept, **later}
    assert resume({"validate": {"epochs": 3}}) == kept
    assert resume({"train": later["validate"]}) == kept
