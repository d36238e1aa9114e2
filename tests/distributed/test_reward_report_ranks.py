"""Two ranks keep the same best checkpoint and report the same figures as one."""

import json
from pathlib import Path
from typing import ClassVar

import lightning.pytorch as pl
import pytest
from lightning.pytorch.strategies import DDPStrategy
from toy_reward import Captions, Painter

from callbacks.checkpoint import RunCheckpoint, SafetensorsCheckpointIO
from callbacks.reward_report import RewardReport
from segalign.run_directory import checkpoint_step, list_checkpoints, read_best

pytestmark = pytest.mark.distributed

# By its own values rank 1 would keep no checkpoint but the first, and wait for rank 0 forever.
VALUES = ({1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3}, {1: 9.0, 2: 8.0, 3: 7.0, 4: 6.0})


class Disagreeing(Painter):
    """Logs another value on each rank."""

    told: ClassVar[list[list[bool]]] = []

    def validation_step(self, batch, batch_idx):
        value = VALUES[self.global_rank][self.global_step]
        self.log("val/held_out", value, batch_size=1, rank_zero_only=False)

    def score_images(self, images, captions, valid=None):
        self.told.append(valid.tolist())
        return super().score_images(images, captions)


class Calls(pl.Callback):
    """Write what each rank has generated, and which rows were no padding when it scored."""

    def on_fit_end(self, trainer, pl_module):
        path = Path(trainer.default_root_dir) / f"calls-{trainer.global_rank}.json"
        path.write_text(json.dumps([pl_module.calls, pl_module.told]))


def fit(run_dir: Path, devices: int) -> list[tuple[list[tuple[list[int], str]], list[list[bool]]]]:
    run_dir.mkdir()
    Disagreeing.told.clear()
    data = Captions(10)
    pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=DDPStrategy(start_method="fork") if devices > 1 else "auto",
        max_steps=4,
        val_check_interval=1,
        num_sanity_val_steps=0,
        logger=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
        plugins=[SafetensorsCheckpointIO()],
        callbacks=[
            RewardReport(num_captions=7, num_pictures=3, batch_size=3),
            Calls(),
            RunCheckpoint(every_n_steps=100, monitor="val/held_out"),
        ],
    ).fit(Disagreeing(data.samples), data)
    return [json.loads((run_dir / f"calls-{rank}.json").read_text()) for rank in range(devices)]


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_report_what_one_does(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    ((alone, _),) = fit(one, 1)
    both, told = zip(*fit(two, 2), strict=True)
    assert [ids for ids, _ in alone] == 3 * [[0, 1, 2], [3, 4, 5], [6]]
    # Shared out, equally many on both; the last caption fills the gap.
    assert [ids for ids, _ in both[0]] == 3 * [[0, 2, 4], [6]]
    assert [ids for ids, _ in both[1]] == 3 * [[1, 3, 5], [6]]
    assert told == (3 * [[True] * 3, [True]], 3 * [[True] * 3, [False]])
    for run_dir in (one, two):
        assert read_best(run_dir).step == 2
        assert [checkpoint_step(path) for path in list_checkpoints(run_dir)] == [2, 4]
    assert (one / "report.md").read_text() == (two / "report.md").read_text()
    assert (one / "report.png").read_bytes() == (two / "report.png").read_bytes()
