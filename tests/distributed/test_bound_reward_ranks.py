"""A bound reward of two ranks is that of their joined batch, and asks the other rank once."""

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
ESTIMATES = {"batch": BatchDirection, "ema": EmaDirection}


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


def score(reward, captions, images, sizes):
    """Bind, score in chunks; return rewards, parts and the gradient in the images."""
    images = images.clone().requires_grad_()
    bound = bind_reward(reward, captions)
    found = [bound(images[rows], rows) for rows in torch.arange(len(images)).split(sizes)]
    rewards = torch.cat([terms.rewards for terms in found])
    (gradient,) = torch.autograd.grad(rewards.square().sum(), images)
    parts = torch.stack([torch.cat([t.parts[name] for t in found]) for name in found[0].parts], 1)
    return torch.cat([rewards.detach()[:, None], parts, gradient.flatten(1)], dim=1)


def score_share(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    reduce, calls = distributed.all_reduce, []
    distributed.all_reduce = lambda *arguments: (calls.append(1), reduce(*arguments))[1]
    rows, found = SHARES[rank], {}
    captions, images = [CAPTIONS[row] for row in rows], pictures()[rows]
    for number, estimate in enumerate(ESTIMATES, 1):
        # Chunks of another number on each rank: calls that asked the other rank would not end.
        found[estimate] = score(mixture(estimate), captions, images, 1)
        assert len(calls) == number
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_score_as_their_joined_batch(tmp_path: Path):
    multiprocessing.start_processes(score_share, (str(tmp_path),), nprocs=2, start_method="fork")
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for estimate in ESTIMATES:
        expected = score(mixture(estimate), CAPTIONS, pictures(), 5)
        for rows, found in zip(SHARES, saved, strict=True):
            assert (found[estimate] - expected[rows]).abs().max() < 1e-12
            captions, images = [CAPTIONS[row] for row in rows], pictures()[rows]
            alone = score(mixture(estimate), captions, images, 5)
            assert (alone - expected[rows]).abs().max() > 1e-3
