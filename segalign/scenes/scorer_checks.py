"""What a scorer of scenes knows: one-fact questions, and pairs of pictures that differ in one fact.

Dims: N samples, P pairs.
"""

from collections.abc import Sequence
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segalign.losses.preference import dense_segment_loss
from segalign.rewards.clip_reward import ClipReward
from segalign.rng import counter_normal, counter_seed
from segalign.scenes.pairs import ScenePair
from segalign.scenes.questions import answer_logits, draw_question_bank, question_answers
from segalign.scenes.samples import SceneSample
from segalign.scenes.world import get_world


def answer_accuracy(
    reward: ClipReward, samples: Sequence[SceneSample], *, noise: float = 0.0, seed: int = 0
) -> float:
    """Ask for every cell and attribute, and the background, which one-fact segment fits best.

    Args:
        reward: Wraps the scorer.
        samples: ``N`` samples of one world.
        noise: Standard deviation of Gaussian noise that is added to the pictures first.
        seed: Seeds wordings and noise.

    Returns:
        Share of right answers in [0, 1]. Chance is 0.30.
    """
    world = get_world(samples[0].metadata["world"])
    random = Random(counter_seed("asked questions", seed))  # noqa: S311
    bank = draw_question_bank(world, random)
    images = as_images([sample.image for sample in samples])
    rows = [(seed, row) for row in range(len(images))]
    noisy = images + noise * counter_normal("asked pictures", rows, images.shape[1:])
    with torch.no_grad():
        image_features = reward.image_features(noisy.clamp(0, 1))
        similarities = image_features @ reward.scorer.text_features(bank.segments).T
    answers = question_answers([sample.metadata for sample in samples], world)
    _, right = dense_segment_loss(answer_logits(similarities, bank.table), answers)
    return float(right.sum() / (answers >= 0).sum())


def pair_margins(reward: ClipReward, pairs: Sequence[ScenePair]) -> Tensor:
    """Score the true picture of each pair and subtract the other's score, ``(P,)``; no gradient."""
    captions = [pair.caption for pair in pairs]
    with torch.no_grad():
        first, second = (
            reward(as_images([pair.images[place] for pair in pairs]), captions) for place in (0, 1)
        )
    signs = torch.tensor([1.0 if pair.preference_probs[0] == 1 else -1.0 for pair in pairs])
    margins: Tensor = (first - second) * signs
    return margins


def as_images(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Stack uint8 pictures ``(H, W, 3)`` to float images in [0, 1], ``(N, 3, H, W)``."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
