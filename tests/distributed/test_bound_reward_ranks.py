"""A bound reward of two ranks is that of their joined batch, and asks the other rank once.

Rows that do not count are as if they were not there, wherever they are.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from transformers import CLIPConfig, CLIPModel

from segalign.formats.clip_scorer import ClipScorer, ImageSettings
from segalign.rewards.bound_reward import bind_reward
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.common_direction import BatchDirection, EmaDirection
from segalign.rewards.mixture import RewardMixture, WeightedReward
from segalign.text.segmenter import SentenceSegmenter
from segalign.text.tokenizer import clip_tokenizer

CAPTIONS = [
    "A red fox sits. It is night.",
    "Two owls.",
    "A green house.",
    "A dog. It runs.",
    "Rain.",
]
# Uneven shares.
SHARES = ([0, 1, 2], [3, 4])
ESTIMATES = {"batch": partial(BatchDirection, refuse_single=True), "ema": EmaDirection}
# What counts: of both ranks; of one only; one caption; nothing.
COUNTED = ([0, 2, 4], [3, 4], [1], [])


def mixture(estimate: str) -> RewardMixture:
    """A decomposed reward in float64, and one that knows nothing of ranks."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape["num_attention_heads"] = 2
    text = shape | {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    vision = shape | {"image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    scorer = ClipScorer(model.double().eval(), clip_tokenizer(), ImageSettings(image_size=16))
    reward = ClipReward(
        scorer,
        segmenter=SentenceSegmenter(),
        common_direction=ESTIMATES[estimate](),
        omega=0.3,
    )
    return RewardMixture(
        {
            "text": WeightedReward(reward=reward),
            "bright": WeightedReward(reward=lambda images, _: images.mean(dim=(1, 2, 3))),
        }
    )


def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(5, 3, 16, 16, generator=generator, dtype=torch.float64)


def score(reward, captions, images, sizes, counted=None):
    """Bind, score in chunks; return rewards, parts and the gradient in the images."""
    images = images.clone().requires_grad_()
    bound = bind_reward(reward, captions, counted=counted)
    found = [bound(images[rows], rows) for rows in torch.arange(len(images)).split(sizes)]
    rewards = torch.cat([terms.rewards for terms in found])
    (gradient,) = torch.autograd.grad(rewards.square().sum(), images)
    parts = torch.stack([torch.cat([t.parts[name] for t in found]) for name in found[0].parts], 1)
    return torch.cat([rewards.detach()[:, None], parts, gradient.flatten(1)], dim=1)


def score_counted(reward, captions, images, rows) -> list[torch.Tensor]:
    """Bind where only some rows count, one batch after another; return scores and averages."""
    found = []
    for kept in COUNTED:
        counted = torch.tensor([row in kept for row in rows])
        found.append(score(reward, captions, images, 1, counted))
        found.append(average(reward))
    return found


def average(reward: RewardMixture) -> torch.Tensor:
    """Return what an estimate has learnt; one of each batch learns nothing."""
    return getattr(reward.rewards["text"].common_direction, "mean", torch.zeros(0)).clone()


def score_share(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    reduce, calls = distributed.all_reduce, []
    distributed.all_reduce = lambda *arguments: (calls.append(1), reduce(*arguments))[1]
    rows, found = SHARES[rank], {}
    captions, images = [CAPTIONS[row] for row in rows], pictures()[rows]
    for estimate in ESTIMATES:
        calls.clear()
        # Chunks of another number on each rank: calls that asked the other rank would not end.
        found[estimate] = score(mixture(estimate), captions, images, 1)
        assert len(calls) == 1
        found[f"{estimate}, some"] = score_counted(mixture(estimate), captions, images, rows)
        assert len(calls) == 1 + len(COUNTED)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    multiprocessing.start_processes(score_share, (str(folder),), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_two_ranks_score_as_their_joined_batch(saved, estimate):
    expected = score(mixture(estimate), CAPTIONS, pictures(), 5)
    for rows, found in zip(SHARES, saved, strict=True):
        assert (found[estimate] - expected[rows]).abs().max() < 1e-12
        captions, images = [CAPTIONS[row] for row in rows], pictures()[rows]
        alone = score(mixture(estimate), captions, images, 5)
        assert (alone - expected[rows]).abs().max() > 1e-3


@pytest.mark.distributed
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_two_ranks_score_as_the_captions_that_count(saved, estimate):
    """Also if none counts on a rank, or on any; one caption is no error in a larger batch."""
    reward = mixture(estimate)
    reward.rewards["text"].common_direction.refuse_single = False
    for place, kept in enumerate(COUNTED):
        if kept:
            expected = score(reward, [CAPTIONS[row] for row in kept], pictures()[kept], 5)
        for rows, found in zip(SHARES, saved, strict=True):
            scores, learnt = found[f"{estimate}, some"][2 * place : 2 * place + 2]
            assert scores.isfinite().all()
            torch.testing.assert_close(learnt, average(reward), rtol=0, atol=1e-15)
            for row in set(kept) & set(rows):
                assert (scores[rows.index(row)] - expected[kept.index(row)]).abs().max() < 1e-12
