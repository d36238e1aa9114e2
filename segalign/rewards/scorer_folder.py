"""A trained scorer as a folder in Hugging Face layout, which rewards and other programs load."""

import copy
import math
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPModel

from segalign.errors import ConfigError
from segalign.formats.clip_scorer import ClipScorer, save_clip_scorer
from segalign.formats.folders import new_folder
from segalign.rewards.scorer_card import ScorerCard
from segalign.rewards.segment_scorer import SegmentScorer
from segalign.rewards.trained_parts import merge_adapters


def save_scorer_folder(
    scorer: SegmentScorer, folder: Path, *, card: ScorerCard, max_logit_scale: float
) -> None:
    """Write a scorer, low-rank adapters merged, whole or not at all; the scorer stays as it is.

    Args:
        scorer: The scorer.
        folder: New folder.
        card: What its README says.
        max_logit_scale: Upper bound of the inverse temperature, as training used it; an optimizer's
            last step may have left the weight beyond.

    Raises:
        ConfigError: If it is no model of transformers, or the folder has content.
        StorageError: If it cannot be written.
    """
    if not isinstance(scorer.model, CLIPModel):
        raise ConfigError(
            "expected a scorer in Hugging Face layout; got "
            f"`{type(scorer.model).__name__}`; export a run that started from such a one"
        )
    model = copy.deepcopy(scorer.model)
    merge_adapters(model)
    # Training keeps it one-dimensional; the layout has a scalar.
    scale = model.logit_scale.detach().reshape(()).clamp(max=math.log(max_logit_scale))
    model.logit_scale = nn.Parameter(scale, requires_grad=False)
    nn.Module.eval(nn.Module.to(model.requires_grad_(False), torch.float32))
    parts = ClipScorer(model, scorer.tower.tokenizer, scorer.preprocessing.settings)
    with new_folder(folder) as unfinished:
        save_clip_scorer(parts, unfinished)
        text = card.text(math.exp(scale.item()))
        (unfinished / "README.md").write_text(text, encoding="utf-8")
