"""Sharded training (FSDP2) is that of DDP and of one rank, and goes on from their checkpoints."""

from pathlib import Path

import pytest
import torch
from sharded_runs import BY_RANK, MODULES, Run, make_all, stored

from segalign.run_format import load_checkpoint, read_tensors

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]

STEPS = 3
# Float64 but for adapters over bfloat16, whose sums differ in nothing but their order either.
TOLERANCE = 1e-9
RESUMED = ["stage one", "preference", "reward, LoRA"]
WHOLE = ("text_models.", "conditioner.", "codec.", "reward.")


class Found:
    """What all runs have left: by name, the findings of each rank, and the checkpoints."""

    def __init__(self, root: Path):
        self.root, self.ranks = root, {}

    def make(self, world: int, *runs: Run) -> None:
        for rank in make_all(list(runs), world, self.root):
            for run, seen in zip(runs, rank, strict=True):
                self.ranks.setdefault(run.folder, []).append(seen)

    def losses(self, run: Run) -> list[float]:
        """Mean over ranks and micro-batches of each step."""
        rows = [seen["losses"] for seen in self.ranks[run.folder]]
        means = [sum(row) / len(row) for row in zip(*rows, strict=True)]
        count = 2 if run.micro_batches == 2 else 1
        return [sum(means[at : at + count]) / count for at in range(0, len(means), count)]

    def tensors(self, run: Run, file: str, step: int = STEPS) -> dict[str, torch.Tensor]:
        return read_tensors(stored(self.root, run, step) / f"{file}.safetensors")


def run(module: str, strategy: str, steps: int = STEPS, **settings) -> Run:
    return Run(module, strategy, steps, **settings)


# Whose rows are two micro-batches on each rank.
IN_PARTS = run("stage one, LoRA", "sharded", 2, name=" in parts", is_cut=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Found:
    root = tmp_path_factory.mktemp("runs")
    everything = Found(root)
    pairs = [run(name, kind) for name in MODULES for kind in ("ddp", "sharded")]
    others = [run(name, kind, 2) for name in BY_RANK for kind in ("ddp", "sharded")]
    again = [resumed(root, name, kind) for kind in ("sharded", "ddp") for name in RESUMED]
    everything.make(2, *pairs, *others, IN_PARTS, *again)
    ones = [run(name, "one") for name in MODULES]
    everything.make(1, *ones, *(on_one_rank(root, name) for name in RESUMED))
    everything.make(2, *(back_on_two(root, name) for name in RESUMED))
    return everything


def resumed(root: Path, module: str, strategy: str) -> Run:
    """Go on, sharded, from the first step of a run on two ranks."""
    start = stored(root, run(module, strategy), 1)
    return run(module, "sharded", start=start, name=f" from {strategy}")


def on_one_rank(root: Path, module: str) -> Run:
    """Make the second step of a sharded run on one rank."""
    return run(module, "one", 2, start=stored(root, run(module, "sharded"), 1), name=" from two")


def back_on_two(root: Path, module: str) -> Run:
    """Make the third step on two ranks again."""
    start = stored(root, on_one_rank(root, module), 2)
    return run(module, "sharded", start=start, name=" from one")


def assert_close(ours, theirs, tolerance=TOLERANCE):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("module", MODULES)
def test_sharded_training_is_that_of_whole_weights(found, module):
    sharded = run(module, "sharded")
    for other in (run(module, "ddp"), run(module, "one")):
        assert found.losses(sharded) == pytest.approx(found.losses(other), rel=1e-6)
        # LoRA over bfloat16 is trained in float32, whose sums over ranks are rounded.
        tolerance = 1e-6 if "bfloat16" in module else TOLERANCE
        for file in ("model", "optimizer"):
            assert_close(found.tensors(sharded, file), found.tensors(other, file), tolerance)
        # Averages are float32.
        assert_close(found.tensors(sharded, "ema"), found.tensors(other, "ema"), 1e-6)
    before = found.tensors(sharded, "model", 1)
    moved = [
        not weight.equal(before[name]) for name, weight in found.tensors(sharded, "model").items()
    ]
    assert all(moved)


@pytest.mark.parametrize("module", BY_RANK)
def test_losses_among_a_ranks_own_samples_are_those_of_ddp(found, module):
    sharded, whole = run(module, "sharded", 2), run(module, "ddp", 2)
    assert any(found.ranks[sharded.folder][0]["is_sharded"].values())
    for ours, theirs in zip(found.ranks[sharded.folder], found.ranks[whole.folder], strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-6)
    for file in ("model", "optimizer"):
        assert_close(found.tensors(sharded, file, 2), found.tensors(whole, file, 2))


def test_micro_batches_add_up_to_the_batch(found):
    straight = run(IN_PARTS.module, "sharded")
    assert found.losses(IN_PARTS) == pytest.approx(found.losses(straight)[:2], rel=1e-6)
    for file in ("model", "optimizer"):
        assert_close(found.tensors(IN_PARTS, file, 2), found.tensors(straight, file, 2))


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("preference")])
def test_images_made_in_between_are_those_of_whole_weights(found, module):
    ours, *others = (found.ranks[run(module, kind).folder] for kind in ("sharded", "ddp", "one"))
    images = ours[0]["images"]
    assert len(images) == 5
    # By raw and averaged weights of the second step, twice; then by those of the third.
    torch.testing.assert_close(images[2], images[0], rtol=0, atol=0)
    torch.testing.assert_close(images[3], images[1], rtol=0, atol=0)
    assert not images[4].equal(images[0])
    for rank in (*ours[1:], *(rank for other in others for rank in other)):
        for image, other in zip(images, rank["images"], strict=True):
            torch.testing.assert_close(image, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("preference")])
def test_metrics_of_images_are_those_of_whole_weights(found, module):
    ours, *others = (found.ranks[run(module, kind).folder] for kind in ("sharded", "ddp", "one"))
    values = ours[0]["values"]
    assert {"fid", "lpips_diversity", "lpips_drift"} <= values.keys()
    assert values["lpips_drift"] > 0
    assert ours[1]["values"] == values
    for rank in (rank for other in others for rank in other):
        # Pixels are rounded, so that the last digit of a weight may move one of them.
        assert rank["values"] == pytest.approx(values, rel=1e-3)


@pytest.mark.parametrize("module", MODULES)
def test_blocks_are_sharded_and_everything_else_is_whole(found, module):
    for rank in found.ranks[run(module, "sharded").folder]:
        sharded = {name for name, is_sharded in rank["is_sharded"].items() if is_sharded}
        if module.startswith("preference"):
            towers = ("vision_model", "text_model")
            blocks = tuple(f"scorer.model.{tower}.encoder.layers." for tower in towers)
        else:
            blocks = ("unet.", "reference_unet.")
        assert sharded == {name for name in rank["is_sharded"] if name.startswith(blocks)}
        assert not any(name.startswith(WHOLE) for name in sharded)
    assert not any(found.ranks[run(module, "ddp").folder][0]["is_sharded"].values())


@pytest.mark.parametrize("module", MODULES)
def test_checkpoints_hold_what_is_trained_whole_and_are_written_once(found, module):
    sharded, whole = run(module, "sharded"), run(module, "one")
    first, second = found.ranks[sharded.folder]
    assert (first["num_saved"], second["num_saved"]) == (STEPS, 0)
    for file in ("model", "ema", "optimizer"):
        ours, theirs = found.tensors(sharded, file), found.tensors(whole, file)
        described = [{k: (v.shape, v.dtype) for k, v in one.items()} for one in (ours, theirs)]
        assert described[0] == described[1]
    parameters = set(found.tensors(sharded, "model")) & set(first["is_sharded"])
    assert parameters == set(first["trained"])


@pytest.mark.parametrize("module", RESUMED)
def test_a_resumed_run_repeats_the_straight_one_to_the_last_bit(found, module):
    again, straight = resumed(found.root, module, "sharded"), run(module, "sharded")
    assert found.losses(again) == found.losses(straight)[1:]
    for file in ("model", "ema", "optimizer"):
        assert_close(found.tensors(again, file), found.tensors(straight, file), 0)


@pytest.mark.parametrize("module", RESUMED)
def test_checkpoints_go_from_strategy_to_strategy_and_world_to_world(found, module):
    straight = run(module, "sharded")
    expected = found.losses(straight)
    from_ddp = resumed(found.root, module, "ddp")
    between, after = on_one_rank(found.root, module), back_on_two(found.root, module)
    assert found.losses(from_ddp) == pytest.approx(expected[1:], rel=1e-6)
    losses = found.losses(between) + found.losses(after)
    assert losses == pytest.approx(expected[1:], rel=1e-6)
    for last in (from_ddp, after):
        for file in ("model", "optimizer"):
            assert_close(found.tensors(last, file), found.tensors(straight, file))
        assert_close(found.tensors(last, "ema"), found.tensors(straight, "ema"), 1e-6)
    updates = load_checkpoint(stored(found.root, after, STEPS))["ema"]["num_updates"]
    assert updates == STEPS
