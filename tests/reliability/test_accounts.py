"""Every sample is accounted for, exactly: over ranks, workers, epochs, and attempts of a run."""

import json
import re
import signal
import time
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import broken_data
import pytest
from broken_forks import in_fork

from segalign.data.accounts import RunAccounts
from segalign.data.ledger import REPORT_NAME, Ledger
from segalign.data.limits import BadSampleLimits
from segalign.data.loaders import BatchSettings, eval_loader, train_loader
from segalign.data.manifest import Manifest, load_manifest, write_manifest
from segalign.data.order import BatchPlan, EpochOrder
from segalign.data.tarfiles import ShardWriter

SIZES = (13, 9, 7)
NUM_SAMPLES = sum(SIZES)
BAD = {3: "caption_not_utf8", 11: "caption_empty", 14: "caption_nul", 28: "caption_missing"}
SHUFFLED = {"seed": 5, "shuffle_window": 2}
LIMITS = BadSampleLimits(max_bad_fraction=1.0, max_bad_shard_fraction=1.0)
CONTENTS = {
    "caption_not_utf8": ("txt", b"\xff"),
    "caption_empty": ("txt", b" "),
    "caption_nul": ("json", rb'{"caption": "a\u0000"}'),
    "caption_missing": ("json", b"{}"),
}
BATCH_SIZE, NUM_STEPS = 8, 9
SECONDS_TO_END = 60  # what the other ranks may take, once one has found too much


def write_captions(folder: Path, bad: dict[int, str]) -> Manifest:
    folder.mkdir(parents=True)
    indices, number = [], 0
    for place, size in enumerate(SIZES):
        with (folder / f"s-{place}.tar").open("wb") as file:
            writer = ShardWriter(file, f"s-{place}.tar")
            for _ in range(size):
                sound = ("txt", f"caption {number}".encode())
                writer.write(f"{number:04d}", [CONTENTS[bad[number]] if number in bad else sound])
                number += 1
            indices.append(writer.finish())
    return write_manifest(folder, indices)


# What must come out, from the order alone


def expected_epochs(num_positions: int) -> list[dict[str, Any]]:
    order = EpochOrder(SIZES, **SHUFFLED)
    met: dict[int, list[int]] = {}
    for position in range(num_positions):
        epoch, number = order.locate(position)
        met.setdefault(epoch, []).append(number)
    return [
        {
            "delivered": sum(number not in BAD for number in numbers),
            "quarantined": dict(Counter(BAD[number] for number in numbers if number in BAD)),
            "not_reached": NUM_SAMPLES - len(numbers),
        }
        for numbers in met.values()
    ]


def expected_faults(num_positions: int) -> list[tuple[int, int, str, str]]:
    order = EpochOrder(SIZES, **SHUFFLED)
    places = [(position, *order.locate(position)) for position in range(num_positions)]
    return [
        (position, epoch, f"{number:04d}", BAD[number])
        for position, epoch, number in places
        if number in BAD
    ]


def check_report(report: dict[str, Any], num_positions: int) -> None:
    """Compare the accounts of a training with what its order says."""
    expected = expected_epochs(num_positions)
    kept = ("delivered", "quarantined", "not_reached")
    assert [{name: epoch[name] for name in kept} for epoch in report["epochs"]] == expected
    for epoch in report["epochs"]:
        quarantined = sum(epoch["quarantined"].values())
        assert quarantined == sum(epoch["quarantined_by_shard"].values())
        told = epoch["earlier"] + epoch["delivered"] + quarantined + epoch["not_reached"]
        assert told == epoch["manifest"] == NUM_SAMPLES
    total = report["delivered"] + sum(report["quarantined"].values())
    assert (report["first_position"], total) == (0, num_positions)
    found = [(f["position"], f["epoch"], f["key"], f["reason"]) for f in report["faults"]]
    assert found == expected_faults(num_positions)
    assert all(f["shard"] in ("s-0.tar", "s-1.tar", "s-2.tar") for f in report["faults"])
    assert all(f["offset"] >= 512 for f in report["faults"])
    assert report["faults_left_out"] == 0


# Ranks and workers, in this process


def count(manifest: Manifest, plan: BatchPlan, num_workers: int) -> dict[str, Ledger]:
    """Train and validate as one rank does; returns its ledgers."""
    accounts = RunAccounts(LIMITS)
    for stage in ("train", "validate"):
        accounts.expect(stage, manifest)
    accounts.begin_training(0, None)
    settings = BatchSettings(content="caption", num_workers=num_workers)
    batches = train_loader(manifest, plan, settings, **SHUFFLED)
    for step, batch in enumerate(islice(batches, NUM_STEPS)):
        accounts.consume(batch, "train", step)
    validation = eval_loader(manifest, plan, settings)
    for batch in chain(validation, validation):
        accounts.consume(batch, "validate", NUM_STEPS)
    return accounts.stages


def check_identity(folder: Path, world_size: int, num_workers: int) -> None:
    """See that the accounts of so many ranks and workers are exact."""
    manifest = load_manifest(folder)
    plans = [
        BatchPlan(global_batch_size=BATCH_SIZE, world_size=world_size, global_rank=rank)
        for rank in range(world_size)
    ]
    first, *others = [count(manifest, plan, num_workers) for plan in plans]
    total = first["train"].merged(other["train"] for other in others)
    check_report(total.report(), NUM_STEPS * BATCH_SIZE)
    total.check_identity()
    validated = first["validate"].merged(other["validate"] for other in others)
    (epoch,) = validated.report()["epochs"]
    counts = (epoch["manifest"], epoch["delivered"], epoch["quarantined"], epoch["not_reached"])
    assert counts == (NUM_SAMPLES, NUM_SAMPLES - len(BAD), dict(Counter(BAD.values())), 0)
    validated.check_identity()


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions") / "shards"
    write_captions(folder, BAD)
    return folder


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_identity_holds_over_ranks_and_workers(captions, world_size, num_workers, is_nightly):
    if (world_size, num_workers) in ((1, 1), (2, 2), (4, 1)) and not is_nightly:
        pytest.skip("nightly")
    check_identity(captions, world_size, num_workers)


COUNTING = (
    broken_data.padding_counts_as_delivered,
    broken_data.faults_are_not_recorded,
    broken_data.faults_shift_the_rows,
)


@pytest.mark.parametrize("broken", COUNTING, ids=lambda broken: broken.__name__)
def test_counting_that_is_broken_is_caught(captions, broken):
    with pytest.raises(AssertionError, match="broken, it is seen"):
        in_fork(broken, lambda: check_identity(captions, 2, 0))


# Runs


@pytest.fixture(scope="module")
def fit(server, captions, tmp_path_factory):
    """Run a fit on so many ranks; returns exit code and output of each."""
    config = tmp_path_factory.mktemp("config") / "captions.yaml"
    config.write_text(f"""
seed_everything: 1
model: {{class_path: toy_captions.CaptionToy}}
data:
  class_path: datamodules.long_caption.LongCaptionDataModule
  init_args:
    {{train_shards: {captions}, val_shards: {captions}, content: caption,
      report_dir: "${{run_dir}}", global_batch_size: {BATCH_SIZE}, num_workers: 1,
      seed: {SHUFFLED["seed"]}, max_bad_fraction: 0.9,
      shuffle_window: {SHUFFLED["shuffle_window"]}}}
trainer:
  {{accelerator: cpu, max_steps: {NUM_STEPS}, val_check_interval: 4, check_val_every_n_epoch: null,
    log_every_n_steps: 1, enable_progress_bar: false, enable_model_summary: false}}
checkpoint: {{every_n_steps: 3}}
ckpt_path: auto
""")

    def fit(run_dir: Path, *options: str, num_ranks: int = 1, broken: Any = ()) -> list[Any]:
        permissions = ["--allow_import=toy_captions", "--allow_import=toy_house"]
        arguments = ["fit", *permissions, f"--config={config}", f"--run_dir={run_dir}", *options]
        if num_ranks > 1:
            arguments += [f"--trainer.devices={num_ranks}", "--trainer.strategy=ddp"]
        names = tuple(f"broken_data.{function.__name__}" for function in broken)
        logs = tmp_path_factory.mktemp("logs")
        if num_ranks > 1:
            started = server.start_ranks(num_ranks, arguments, logs, broken=names)
        else:
            started = [server.start(arguments, logs / "rank-0.txt", broken=names)]
        codes = [server.wait(process) for process in started]
        return [(c, (logs / f"rank-{r}.txt").read_text()) for r, c in enumerate(codes)]

    return fit


KILL = ("--trainer.callbacks+=toy_house.Kill", "--trainer.callbacks.at_step=8")


def reports(run_dir: Path) -> dict[str, Any]:
    """Read a run's report; where in its rank's batch a sample was depends on the ranks."""
    stages = json.loads((run_dir / REPORT_NAME).read_text())
    for report in stages.values():
        for fault in report["faults"]:
            del fault["row"]
    return stages


@pytest.fixture(scope="module")
def straight(fit, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    ((code, output),) = fit(run_dir)
    assert code == 0, output
    return run_dir


def check_resumed(fit: Any, straight: Path, run_dir: Path, num_ranks: int, broken=()) -> None:
    """Kill a run and resume it: its report must be that of the run without an interruption."""
    killed = fit(run_dir, *KILL, num_ranks=num_ranks, broken=broken)
    assert [code for code, _ in killed] == [-signal.SIGKILL] * num_ranks, killed
    resumed = fit(run_dir, num_ranks=num_ranks, broken=broken)
    assert [code for code, _ in resumed] == [0] * num_ranks, resumed
    assert reports(run_dir) == reports(straight)
    if num_ranks == 1:
        one, other = ((run / REPORT_NAME).read_bytes() for run in (run_dir, straight))
        assert one == other


def test_a_straight_run_accounts_for_what_its_steps_consumed(straight):
    stages = reports(straight)
    check_report(stages["train"], NUM_STEPS * BATCH_SIZE)
    assert stages["validate"]["delivered"] == NUM_SAMPLES - len(BAD)
    assert set(stages) == {"sanity_check", "train", "validate"}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_resumed_run_reports_what_a_straight_run_does(fit, straight, tmp_path, num_ranks):
    check_resumed(fit, straight, tmp_path / "run", num_ranks)


def test_a_run_resumed_on_other_ranks_reports_the_same(fit, straight, tmp_path, is_nightly):
    if not is_nightly:
        pytest.skip("nightly")
    run_dir = tmp_path / "run"
    for num_ranks, at_step in ((2, 4), (1, 7), (2, 0)):
        kill = (KILL[0], f"--trainer.callbacks.at_step={at_step}") if at_step else ()
        codes = [code for code, _ in fit(run_dir, *kill, num_ranks=num_ranks)]
        assert codes == [-signal.SIGKILL if at_step else 0] * num_ranks
    assert reports(run_dir) == reports(straight)


STOP = ("--trainer.callbacks+=stop_between.StopBetween", "--trainer.callbacks.at_step=5")


def check_stopped_between(
    fit: Any, straight: Path, run_dir: Path, num_ranks: int, broken=()
) -> None:
    """Stop a run in the middle of a step and resume it: each sample is accounted for once."""
    halves = ("--trainer.accumulate_grad_batches=2", "--allow_import=stop_between")
    stopped = fit(run_dir, *halves, *STOP, num_ranks=num_ranks, broken=broken)
    assert [code for code, _ in stopped] == [0] * num_ranks, stopped
    # A sixth step had begun, of which a half was consumed.
    check_report(reports(run_dir)["train"], 5 * BATCH_SIZE)
    resumed = fit(run_dir, *halves, num_ranks=num_ranks, broken=broken)
    assert [code for code, _ in resumed] == [0] * num_ranks, resumed
    assert reports(run_dir)["train"] == reports(straight)["train"]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_stop_in_the_middle_of_a_step_loses_no_counts(fit, straight, tmp_path, num_ranks):
    check_stopped_between(fit, straight, tmp_path / "run", num_ranks)


def check_strict(fit: Any, run_dir: Path, broken=()) -> None:
    """See that all ranks end alike when one of them finds too much."""
    started = time.monotonic()
    found = fit(
        run_dir, "--data.init_args.strict=true", "--trainer.num_sanity_val_steps=0",
        num_ranks=2, broken=broken,
    )  # fmt: skip
    assert time.monotonic() - started < SECONDS_TO_END
    assert [code for code, _ in found] == [65, 65], found
    lines = [re.findall("^error: .*$", output, re.MULTILINE) for _, output in found]
    assert lines[0] == lines[1], found
    assert len(lines[0]) == 1
    assert "at most no sample (`strict`) may be unreadable" in lines[0][0]
    assert not any("Traceback" in output for _, output in found)
    report = reports(run_dir)["train"]
    (first, *_), (position, _, key, reason) = report["faults"], expected_faults(BATCH_SIZE * 4)[0]
    assert (first["position"], first["key"], first["reason"]) == (position, key, reason)
    # All that was consumed up to then, by both ranks.
    assert report["delivered"] + sum(report["quarantined"].values()) == (
        BATCH_SIZE * (position // BATCH_SIZE + 1)
    )


def test_all_ranks_end_alike_when_one_finds_too_much(fit, tmp_path):
    check_strict(fit, tmp_path / "run")


ALONE = (broken_data.counts_are_not_stored,)
TOGETHER = (broken_data.each_rank_stores_its_own_counts, broken_data.all_ranks_take_the_counts)


@pytest.mark.parametrize("broken", ALONE, ids=lambda broken: broken.__name__)
def test_keeping_that_is_broken_is_caught(fit, straight, tmp_path, broken):
    with pytest.raises(AssertionError):
        check_resumed(fit, straight, tmp_path / "run", 1, broken=(broken,))


def test_counting_of_steps_under_way_is_caught(fit, straight, tmp_path):
    broken = (broken_data.steps_under_way_are_counted,)
    with pytest.raises(AssertionError):
        check_stopped_between(fit, straight, tmp_path / "run", 1, broken=broken)


def test_counting_of_reads_is_caught(fit, tmp_path):
    run_dir = tmp_path / "run"
    fit(run_dir, broken=(broken_data.reads_are_counted,))
    with pytest.raises(AssertionError):
        check_report(reports(run_dir)["train"], NUM_STEPS * BATCH_SIZE)


@pytest.mark.parametrize("broken", TOGETHER, ids=lambda broken: broken.__name__)
def test_bringing_together_that_is_broken_is_caught(fit, straight, tmp_path, is_nightly, broken):
    if not is_nightly:
        pytest.skip("nightly")
    with pytest.raises(AssertionError):
        check_resumed(fit, straight, tmp_path / "run", 2, broken=(broken,))


def test_an_end_of_one_rank_alone_is_caught(fit, tmp_path, is_nightly):
    if not is_nightly:
        pytest.skip("nightly")
    with pytest.raises(AssertionError):
        check_strict(fit, tmp_path / "run", broken=(broken_data.a_rank_ends_alone,))


BROKEN = (
    *COUNTING, *ALONE, *TOGETHER, broken_data.steps_under_way_are_counted,
    broken_data.reads_are_counted, broken_data.a_rank_ends_alone,
)  # fmt: skip
