"""Training does not notice that it is evaluated, nor evaluation how many ranks there are."""

import csv
import json
from pathlib import Path

import broken_evaluation
import pytest
import torch
from broken_forks import in_fork
from resumed_runs import EMA, PERMISSIONS, stage_one
from torch import distributed, multiprocessing
from toy_features import toy_features

from segalign.metrics.frechet_distance import FrechetDistance
from segalign.run_directory import newest_checkpoint

STEPS, EVERY = 9, 3
WIDTH, COUNT = 8, 60
# The images of each rank and how many come at a time: uneven, in any order, some ranks have none.
ROWS = {
    1: [range(COUNT)],
    2: [range(41, COUNT), range(40, -1, -1)],
    3: [range(0, COUNT, 3), range(1, COUNT, 3), range(COUNT - 1, 0, -3)],
    4: [range(25), [], range(COUNT - 1, 30, -1), range(25, 31)],
    7: [[], range(5), range(COUNT - 1, 39, -1), [], range(5, 6), range(6, 40), []],
}


def fit(server, place: Path, name: str, options: list[str], callbacks, broken=()) -> int:
    """Start stage 1 on tiny scenes, which logs the loss of every step."""
    settings, _ = stage_one(place, STEPS)
    arguments = ["fit", *PERMISSIONS, *settings, f"--run_dir={place / name}", *options]
    more = ["--trainer.log_every_n_steps=1", f"--trainer.callbacks={json.dumps(callbacks)}"]
    return server.start([*arguments, *more], place / "log.txt", broken=broken)


def curve(run_dir: Path) -> dict[str, str]:
    with (run_dir / "logs" / "metrics.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {row["step"]: row["train/loss"] for row in rows if row.get("train/loss")}


def weights(run_dir: Path) -> list[bytes]:
    names = ("model", "ema", "optimizer")
    return [(newest_checkpoint(run_dir) / f"{name}.safetensors").read_bytes() for name in names]


def check_neutrality(server, place: Path, broken=()) -> None:
    """Compare a run that is evaluated every few steps with one that never is."""
    _, measured = stage_one(place, STEPS)
    # Micro-batches are what Lightning counts; two of them are a step.
    often = [f"--trainer.val_check_interval={2 * EVERY}"]
    processes = [fit(server, place, "watched", often, measured, broken)]
    processes.append(fit(server, place, "alone", ["--trainer.limit_val_batches=0"], [EMA]))
    codes = [server.wait(process) for process in processes]
    assert codes == [0, 0], (place / "log.txt").read_text()
    history = (place / "watched" / "evaluation" / "history.jsonl").read_text().splitlines()
    assert len(history) >= STEPS // EVERY
    assert not (place / "alone" / "evaluation").exists()
    watched, alone = place / "watched", place / "alone"
    assert len(curve(alone)) == STEPS
    assert curve(watched) == curve(alone)  # as text: to the last bit
    assert weights(watched) == weights(alone)


def test_an_evaluation_every_third_step_changes_no_bit(server, tmp_path):
    check_neutrality(server, tmp_path)


def distance(rows, chunk: int, group=None) -> torch.Tensor:
    """Measure generated against real features; some of them come twice."""
    made, real = toy_features(COUNT, WIDTH, 1, 0.3), toy_features(COUNT, WIDTH)
    metric = FrechetDistance(WIDTH, COUNT, real=COUNT, process_group=group)
    for part in torch.tensor(list(rows), dtype=torch.int64).split(chunk):
        ids = torch.cat([part, part[:2]])
        counted = torch.ones(len(ids), dtype=torch.bool)
        metric.update(made[ids], ids, counted)
        metric.update(real[ids], ids, counted, real=True)
    return torch.as_tensor(metric.compute())


def measure_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    world = max(ROWS)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    groups = {size: distributed.new_group(list(range(size))) for size in ROWS if size > 1}
    for size, group in groups.items():
        if rank < size:
            torch.save(distance(ROWS[size][rank], 3 + size, group), f"{folder}/{size}-{rank}.pt")
    distributed.destroy_process_group()


def check_ranks(folder: Path) -> None:
    """Compare the distance of every number of ranks with that of one."""
    folder.mkdir(exist_ok=True)
    expected = distance(ROWS[1][0], COUNT)
    assert expected > 0.01
    multiprocessing.start_processes(
        measure_rank, (str(folder),), nprocs=max(ROWS), start_method="fork"
    )
    found = {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*-*.pt")}
    assert len(found) == sum(size for size in ROWS if size > 1)
    assert [name for name, value in found.items() if not torch.equal(value, expected)] == []


def test_any_number_of_ranks_measures_the_same_bits(tmp_path):
    check_ranks(tmp_path)


BROKEN_TRAINING = (broken_evaluation.moves_a_weight, broken_evaluation.leaves_the_average_in)
BROKEN_RANKS = (broken_evaluation.rounds_otherwise_on_a_rank,)


@pytest.mark.parametrize("broken", BROKEN_TRAINING)
def test_evaluation_is_caught_broken(server, tmp_path, broken, is_nightly):
    if not is_nightly:
        pytest.skip("a run of about 10 s each")
    with pytest.raises(AssertionError, match=r"assert .* == "):
        check_neutrality(server, tmp_path, (f"broken_evaluation.{broken.__name__}",))


@pytest.mark.parametrize("broken", BROKEN_RANKS)
def test_sums_are_caught_broken(tmp_path, broken):
    with pytest.raises(AssertionError, match="broken, it is seen"):
        in_fork(broken, lambda: check_ranks(tmp_path))


BROKEN = (*BROKEN_TRAINING, *BROKEN_RANKS)
