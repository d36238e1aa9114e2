"""No defect of data loses a sample silently: it is refused, set aside and told, or read right."""

import contextlib
import json
from itertools import islice
from pathlib import Path
from typing import Any

import broken_data
import defective_manifests
import defective_samples
import defective_shards
import numpy as np
import pytest
from broken_forks import in_fork
from defects import (
    BAD,
    BAD_SHARD,
    NUM_SAMPLES,
    SIDE,
    Defect,
    Refused,
    SetAside,
    Usable,
    colour_of,
    key_of,
    write_folder,
)

from segalign.data.accounts import RunAccounts
from segalign.data.ledger import REPORT_NAME
from segalign.data.limits import BadSampleLimits
from segalign.data.loaders import BatchSettings, open_shards, train_loader
from segalign.data.manifest import index_shards
from segalign.data.order import BatchPlan
from segalign.errors import DataError

DEFECTS = [
    defect
    for module in (defective_samples, defective_shards, defective_manifests)
    for defect in module.CATALOGUE.defects
]
BY_NAME = {defect.name: defect for defect in DEFECTS}
BATCH_SIZE = 3


def prepare(folder: Path, defect: Defect) -> None:
    write_folder(folder, defect)
    index_shards(folder)
    if defect.stage == "indexed":
        defect.damage(folder)


def read_epoch(folder: Path, defect: Defect, limits: BadSampleLimits) -> dict[int, Any]:
    """Read all samples once and report; returns the pictures of those that were delivered."""
    manifest = open_shards(folder)
    plan = BatchPlan(global_batch_size=BATCH_SIZE)
    settings = BatchSettings(content=defect.content, image_size=SIDE)
    accounts = RunAccounts(limits)
    accounts.begin()
    accounts.expect("train", manifest)
    accounts.begin_training(0, None)
    delivered = {}
    images = "images" if defect.content == "image" else "image_pairs"
    with contextlib.ExitStack() as stack:
        batches = train_loader(manifest, plan, settings, seed=1, shuffle_window=1)
        for step, batch in enumerate(islice(batches, NUM_SAMPLES // BATCH_SIZE)):
            accounts.consume(batch, "train", step)
            for row in batch["valid"].nonzero().flatten().tolist():
                pixels = batch[images][row].reshape(-1, 3, SIDE, SIDE)[0]
                number = int(batch["sample_ids"][row])
                assert batch["captions"][row] in (f"caption {number}", "a caption"), number
                delivered[number] = pixels.permute(1, 2, 0).numpy() * 255
            if step == 0 and defect.stage == "reading":
                stack.enter_context(defect.damage(folder))
    accounts.close(folder, NUM_SAMPLES)
    return delivered


def check_defect(folder: Path, defect: Defect) -> None:
    """See that a defect comes to what it should."""
    delivered, refusal = {}, ""
    try:
        prepare(folder, defect)
        limits = BadSampleLimits(max_bad_fraction=1.0, max_bad_shard_fraction=1.0)
        delivered = read_epoch(folder, defect, limits)
    except DataError as error:
        refusal = str(error)
    assert isinstance(defect.expected, Refused) == bool(refusal), refusal or sorted(delivered)
    if isinstance(defect.expected, Refused):
        assert defect.expected.text in refusal
        assert refusal.isprintable()
        return
    report = json.loads((folder / REPORT_NAME).read_text())["train"]
    check_accounts(report, delivered)
    check_losses(report, defect)
    check_pictures(delivered, defect)


def check_accounts(report: dict[str, Any], delivered: dict[int, Any]) -> None:
    """See that every sample was delivered, or is told with all that finds it."""
    (epoch,) = report["epochs"]
    quarantined = sum(epoch["quarantined"].values())
    assert epoch["manifest"] == NUM_SAMPLES
    assert epoch["delivered"] == len(delivered)
    assert epoch["earlier"] + epoch["delivered"] + quarantined + epoch["not_reached"] == NUM_SAMPLES
    assert epoch["earlier"] == epoch["not_reached"] == 0
    told = {(fault["shard"], Path(fault["key"]).name): fault for fault in report["faults"]}
    for number in range(NUM_SAMPLES):
        place = (f"shard-{number // 6}.tar", key_of(number))
        assert (number in delivered) != (place in told), number
    for fault in told.values():
        assert fault["offset"] >= 512
        assert fault["reason"] in epoch["quarantined"]
        assert fault["detail"]


def check_losses(report: dict[str, Any], defect: Defect) -> None:
    expected = {}
    if isinstance(defect.expected, SetAside):
        count = defect.expected.count
        found = report["quarantined"].get(defect.expected.reason, 0)
        expected = {defect.expected.reason: max(1, found) if count is None else count}
    assert report["quarantined"] == expected
    if sum(expected.values()) == 1:
        (fault,) = report["faults"]
        assert (fault["shard"], fault["key"]) == (BAD_SHARD, key_of(BAD))


def check_pictures(delivered: dict[int, Any], defect: Defect) -> None:
    for number, pixels in delivered.items():
        expected, tolerance = np.full((SIDE, SIDE, 3), colour_of(number)), 1e-3
        if number == BAD and isinstance(defect.expected, Usable):
            changed = defect.expected.pixels
            if changed is not None:
                expected, tolerance = changed, defect.expected.tolerance
        assert np.abs(pixels - expected).max() <= tolerance, number


def test_there_are_many_kinds():
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS) >= 25


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_no_defect_loses_a_sample_silently(tmp_path, defect):
    check_defect(tmp_path / "shards", defect)


def check_strict(folder: Path) -> None:
    """See that a strict run ends at the first sample that is set aside."""
    defect = BY_NAME["cut_jpeg"]
    prepare(folder, defect)
    with contextlib.suppress(DataError):
        read_epoch(folder, defect, BadSampleLimits(strict=True))
        raise AssertionError("a strict run went on")


def test_strict_ends_at_the_first(tmp_path):
    check_strict(tmp_path / "shards")


BROKEN = (
    (broken_data.crc_is_not_checked, "flipped_bit_in_an_image"),
    (broken_data.end_mark_is_not_checked, "cut_before_a_header"),
    (broken_data.links_are_skipped, "symbolic_link"),
    (broken_data.bombs_are_decoded, "bomb_of_66_megapixels"),
    (broken_data.image_faults_are_filled_in, "garbage_jpeg"),
    (broken_data.members_may_have_any_name, "member_that_says_it_is_padding"),
    (broken_data.faults_are_not_recorded, "no_caption"),
    (broken_data.faults_shift_the_rows, "no_caption"),
)


@pytest.mark.parametrize(
    ("broken", "name"), BROKEN, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_reader_that_is_broken_is_caught(tmp_path, broken, name):
    with pytest.raises(AssertionError, match="broken, it is seen"):
        in_fork(broken, lambda: check_defect(tmp_path / "shards", BY_NAME[name]))


def test_a_strict_that_is_broken_is_caught(tmp_path):
    with pytest.raises(AssertionError, match="broken, it is seen"):
        in_fork(broken_data.strict_is_ignored, lambda: check_strict(tmp_path / "shards"))
