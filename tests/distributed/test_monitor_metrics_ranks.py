"""What the over-fitting monitor sees is the same to the last bit for one to four ranks."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from toy_evaluation import ToyGenerator, setting_of
from toy_features import ToyExtractor
from toy_scorer import toy_caption, toy_scorer

from segalign.evaluation.evaluator import Evaluator
from segalign.metrics.image_similarity import ImageSimilarity
from segalign.metrics.image_statistics import ImageStatistics
from segalign.metrics.reward_means import RewardMetric
from segalign.rewards.batch_directions import EmaDirection
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.scoring import score_images

pytestmark = pytest.mark.distributed

# Three micro-batches of four, the last one half full: of four ranks one has nothing but padding.
NUM_CAPTIONS, PER_CAPTION, BATCH_SIZE = 5, 2, 4


class Spoilt(ToyExtractor):
    """An extractor that fails for dark images."""

    def load(self):
        return self

    def __call__(self, pixels):
        found = super().__call__(pixels)
        dark = pixels.float().flatten(1).mean(1) < 127.5
        return found._replace(features=torch.where(dark[:, None], torch.nan, found.features))


def evaluate() -> dict:
    rows = [
        {"sample_id": i, "caption": toy_caption(i), "metadata": {}} for i in range(NUM_CAPTIONS)
    ]
    setting = setting_of(NUM_CAPTIONS, PER_CAPTION, BATCH_SIZE, rows=rows)
    reward = ClipReward(toy_scorer()._parts, common_direction=EmaDirection(), omega=0.3).eval()

    def score(images, captions, valid):
        scores = score_images({"reward": reward}, images, captions, valid)
        dark = images.flatten(1).mean(1) < 0.5
        return scores | {"held_out/light": torch.where(dark, torch.nan, scores["reward"])}

    metrics = [
        RewardMetric(score, {"reward": reward}),
        ImageSimilarity(reward),
        ImageSimilarity(Spoilt(), name="spoilt", suffix="/spoilt"),
        ImageStatistics(),
    ]
    # The images of one caption are not finite.
    generator = ToyGenerator(size=16, bad_captions=[toy_caption(3)])
    outcome = Evaluator(setting, metrics).run(generator)
    assert outcome.num_counted == 8
    found = {name: vars(findings) for name, findings in outcome.findings.items()}
    return {"values": dict(outcome.values), "findings": found}


def plain(found: dict) -> str:
    return json.dumps(found, default=list, sort_keys=True)


def evaluate_rank(rank: int, folder: str, world_size: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    Path(folder, f"{rank}.json").write_text(plain(evaluate()))
    distributed.destroy_process_group()


def test_any_number_of_ranks_sees_the_same(tmp_path: Path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = evaluate()
    torch.set_num_threads(threads)
    values = alone["values"]
    assert values.keys() >= {"monitor/reward", "image_to_v_similarity", "same_prompt_similarity"}
    assert all(map(math.isfinite, values.values()))
    light = alone["findings"]["rewards"]["per_image"]["monitor/held_out/light"]
    (note,) = alone["findings"]["spoilt"]["notes"]
    assert note.endswith("images are left out, whose features are not finite")
    assert 0 < sum(value is not None and math.isnan(value) for value in light) < 8
    for world_size in (2, 3, 4):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        multiprocessing.start_processes(
            evaluate_rank, (str(folder), world_size), nprocs=world_size, start_method="fork"
        )
        for rank in range(world_size):
            assert (folder / f"{rank}.json").read_text() == plain(alone)
