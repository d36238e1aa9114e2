"""NaN and infinity on one rank: all ranks skip the same step, and nothing but the step changes."""

import json
import math
import re
from functools import partial
from pathlib import Path

import broken_non_finite
import lightning.pytorch as pl
import pytest
import torch
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader
from toy_non_finite import BAD_STEP, KINDS, NUM_STEPS, Bad, LineModule, Rows, Snapshots, make_all

from callbacks.ema import EMA
from segalign.run_directory import newest_checkpoint

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*:UserWarning"),
]

NOT_FINITE = 70
LINE = [Bad("line", kind) for kind in KINDS]
USUAL = [
    *LINE,
    Bad("line", "loss", rank=0, value=math.inf),
    Bad("line", "gradient", rank=0, value=-math.inf),
    Bad("stage one", "loss"),
    Bad("stage one", "gradient", value=math.inf),
    Bad("stage one", "averaged gradient", value=math.inf, strategy="sharded"),
    Bad("preference", "loss alone", rank=0),
    Bad("reward", "reward"),
]
NIGHTLY = [
    Bad(module, kind, rank, value)
    for module in ("stage one", "preference", "scenes", "reward")
    for kind in (*KINDS, *(["reward"] if module == "reward" else []))
    for rank in (0, 1)
    for value in (math.inf, math.nan)
    # The part of the reward that fails is that of the second rank.
    if (kind, rank) != ("reward", 0)
] + [
    Bad("stage one", kind, rank, strategy="sharded")
    for kind in ("loss", "loss alone", "averaged gradient")
    for rank in (0, 1)
]


def check_a_bad_step_changes_nothing(bads: list[Bad], folder: Path, broken: str | None = None):
    """Compare a bad step's before and after, and what follows with a run that was kept from it."""
    by_hand = {bad: Bad(bad.module, strategy=bad.strategy) for bad in bads}
    found = make_all(list(dict.fromkeys([*by_hand.values(), *bads])), folder, broken)
    for bad in bads:
        first, second = found[bad]
        for rank, seen in enumerate(found[bad]):
            told = f"{bad}, seen by rank {rank}"
            expected = found[by_hand[bad]][rank]
            assert any(name.startswith("exp_avg") or "momentum" in name for name in seen["before"])
            assert ("direction 0" in seen["before"]) == (bad.module == "reward"), told
            assert seen["before"] == seen["after"], told
            assert seen["end"] == expected["end"], told
            assert seen["end"] != seen["after"], told
            # The learning rate and the count of steps move on; the average's own count does not.
            assert seen["after: numbers"]["step"] == BAD_STEP + 1, told
            assert seen["end: numbers"] == expected["end: numbers"], told
            assert seen["end: numbers"]["updates"] == NUM_STEPS - 1, told
            assert seen["end: numbers"]["lr"] == pytest.approx(
                seen["before: numbers"]["lr"] * (1 + BAD_STEP) / (1 + NUM_STEPS)
            )
            assert seen["logged"] == 1, told
        assert first["skipped"] == second["skipped"] is not None, bad
        check_told(bad, first["skipped"])
        if bad.strategy == "ddp":
            assert first["end"] == second["end"], bad


def check_told(bad: Bad, skipped: dict):
    assert skipped["step"] == BAD_STEP, bad
    ids, is_line = skipped["sample_ids"], bad.module == "line"
    first = (10 if is_line else 4) * BAD_STEP
    if "gradient" in bad.kind:
        assert re.fullmatch(r"the losses are finite, and .* is not: `.*weight`", skipped["reason"])
        assert sorted(ids) == [first, first + 1, first + 2, first + 3], bad
        return
    lost = 2 if bad.kind == "reward" else 1
    assert skipped["reason"].startswith(f"the losses of {lost} samples are not finite"), bad
    assert (bad.kind == "reward") == ("(rank 1: the reward: `fails` for " in skipped["reason"])
    if bad.module == "stage one":
        # Micro-batches of one row: of each rank, the first goes wrong.
        assert ids == [first + 2 * bad.rank], bad
    else:
        assert ids == [first + 2 * bad.rank + row for row in range(lost)], bad


def test_a_bad_step_changes_nothing(tmp_path, is_nightly):
    check_a_bad_step_changes_nothing(USUAL + NIGHTLY * is_nightly, tmp_path)


BROKEN_STEPS = (
    broken_non_finite.each_rank_decides_alone,
    broken_non_finite.one_rank_raises,
    broken_non_finite.gradients_of_zero,
    broken_non_finite.gradients_are_kept,
    broken_non_finite.only_losses_are_looked_at,
    broken_non_finite.only_gradients_are_looked_at,
    broken_non_finite.the_average_moves,
)


@pytest.mark.parametrize("broken", [one.__name__ for one in BROKEN_STEPS])
def test_a_bad_step_is_caught_broken(broken, tmp_path):
    # A rank that raises ends the other, which waits for it.
    raised = broken_non_finite.one_rank_raises.__name__ == broken
    expected = (ProcessRaisedException, "NonFiniteError: ") if raised else (AssertionError, "line")
    with pytest.raises(expected[0], match=expected[1]):
        check_a_bad_step_changes_nothing(LINE, tmp_path, f"broken_non_finite.{broken}")


def test_a_direction_that_moves_is_caught(tmp_path):
    broken = f"broken_non_finite.{broken_non_finite.the_direction_moves.__name__}"
    with pytest.raises(AssertionError, match="module='reward'"):
        check_a_bad_step_changes_nothing([Bad("reward", "reward")], tmp_path, broken)


OPTIMIZERS = {
    "AdamW, one at a time": partial(torch.optim.AdamW, lr=0.1, foreach=False),
    "AdamW, many at a time": partial(torch.optim.AdamW, lr=0.1, foreach=True),
    "AdamW, fused": partial(torch.optim.AdamW, lr=0.1, fused=True, amsgrad=True),
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "SGD, fused": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.1, momentum=0.9),
    "Adafactor": torch.optim.Adafactor,
}


class BadRow(pl.Callback):
    """Make the first row of one step infinite: both its loss and its gradient are."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == BAD_STEP and batch_idx % 2 == 0:
            batch["x"][0, 0] = math.inf


@pytest.mark.parametrize("clip", [(None, None), (0.1, "norm"), (0.1, "value")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_changes_anything(name, clip, tmp_path):
    watch = Snapshots()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=NUM_STEPS,
        accumulate_grad_batches=2,
        gradient_clip_val=clip[0],
        gradient_clip_algorithm=clip[1],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMA(), BadRow(), watch],
        default_root_dir=tmp_path,
    )
    module = LineModule(OPTIMIZERS[name])
    trainer.fit(module, DataLoader(Rows(0, 0), batch_size=None))
    assert watch.found["skipped"]["sample_ids"] == [20]
    assert watch.found["before"] == watch.found["after"] != watch.found["end"]
    assert len(watch.found["before"]) > 4  # weights, averages, and a state of the optimizer


# Runs of commands

CONFIG = """\
seed_everything: 7
model:
  class_path: toy_non_finite.LineModule
  init_args:
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
data: {class_path: toy_non_finite.LineData}
trainer:
  accelerator: cpu
  max_steps: 24
  log_every_n_steps: 1
  limit_val_batches: 0
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
checkpoint: {every_n_steps: 4}
"""
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Compose a fit in which steps of a rank are bad, from one to another."""
    config = tmp_path_factory.mktemp("config") / "line.yaml"
    config.write_text(CONFIG)

    def command(run_dir: Path, *options: str, rank: int, first: int = 2, last: int = 99):
        spoil = {"rank": rank, "first": first, "last": last, "kind": "loss"}
        spoils = {"class_path": "toy_non_finite.Spoil", "init_args": spoil}
        averages = {"class_path": "callbacks.ema.EMA"}
        return [
            "fit", "--allow_import=toy_non_finite", f"--config={config}", f"--run_dir={run_dir}",
            "--ckpt_path=auto", f"--trainer.callbacks={json.dumps([averages, spoils])}", *options,
        ]  # fmt: skip

    return command


def lines(run_dir: Path) -> list[dict]:
    path = run_dir / "logs" / "skipped_steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_ten_in_a_row_end_all_ranks(server, command, folder: Path, broken=()):
    run_dir = folder / "run"
    processes = server.start_ranks(2, command(run_dir, *TWO, rank=1), folder / "logs", None, broken)
    # A minute is for the slowest of machines; a rank that waits would do so for half an hour.
    codes = [server.wait(process, seconds=60) for process in processes]
    logs = [(folder / "logs" / f"rank-{rank}.txt").read_text() for rank in range(2)]
    assert codes == [NOT_FINITE, NOT_FINITE], logs
    expected = (
        "error: expected finite losses and gradients; got 10 skipped steps in a row, the last of "
        "them step 11: the losses of 1 samples are not finite; samples 112; no weight was changed; "
    )
    for log in logs:
        assert re.findall("^error: ", log, re.MULTILINE) == ["error: "], log
        assert expected in log
        assert "Traceback" not in log
    said = [re.findall("skipped on all ranks, step [0-9]+", log) for log in logs]
    assert said == [[f"skipped on all ranks, step {step}" for step in range(2, 12)], []]
    assert [line["step"] for line in lines(run_dir)] == list(range(2, 12))
    assert all(line["sample_ids"] == [10 * line["step"] + 2] for line in lines(run_dir))
    metrics = (run_dir / "logs" / "metrics.csv").read_text().splitlines()
    assert "train/skipped_steps" in metrics[0]


def test_ten_in_a_row_end_all_ranks(server, command, tmp_path):
    check_ten_in_a_row_end_all_ranks(server, command, tmp_path)


BROKEN_ENDS = (broken_non_finite.nothing_is_counted, broken_non_finite.the_first_rank_ends_alone)


@pytest.mark.parametrize("broken", [one.__name__ for one in BROKEN_ENDS])
def test_an_end_is_caught_broken(broken, server, command, tmp_path):
    with pytest.raises(AssertionError):
        check_ten_in_a_row_end_all_ranks(
            server, command, tmp_path, (f"broken_non_finite.{broken}",)
        )


def check_a_resumed_run_counts_on(server, command, folder: Path, broken=()):
    run_dir, log = folder / "run", folder / "log.txt"

    def fit(*options: str) -> int:
        server.start(command(run_dir, *options, rank=0), log, None, broken)
        return server.wait(seconds=60)

    assert fit("--trainer.max_steps=8") == 0, log.read_text()
    assert [line["step"] for line in lines(run_dir)] == list(range(2, 8))
    with (run_dir / "logs" / "skipped_steps.jsonl").open("a") as file:
        # As of an attempt that was killed later, where steps need not be bad again.
        file.write('{"step": 99, "reason": "", "sample_ids": []}\n{"step": 8, "rea')
    assert fit() == NOT_FINITE, log.read_text()
    assert "got 10 skipped steps in a row, the last of them step 11: " in log.read_text()
    assert [line["step"] for line in lines(run_dir)] == list(range(2, 12))
    assert newest_checkpoint(run_dir).name == "step-00000008"


def test_a_resumed_run_counts_on(server, command, tmp_path):
    check_a_resumed_run_counts_on(server, command, tmp_path)


BROKEN_COUNTS = (
    broken_non_finite.counts_are_not_stored,
    broken_non_finite.repeated_lines_stay,
)


@pytest.mark.parametrize("broken", [one.__name__ for one in BROKEN_COUNTS])
def test_a_count_is_caught_broken(broken, server, command, tmp_path):
    with pytest.raises(AssertionError):
        check_a_resumed_run_counts_on(server, command, tmp_path, (f"broken_non_finite.{broken}",))


BROKEN = (
    *BROKEN_STEPS, broken_non_finite.the_direction_moves, *BROKEN_ENDS, *BROKEN_COUNTS
)  # fmt: skip
