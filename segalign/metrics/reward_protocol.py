"""What the numbers of a reward depend on besides images and captions, as plain data.

Dims: E joint-embedding width.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.common_direction import CorpusDirection
from segalign.rewards.direction_checks import describe_text
from segalign.rewards.mixture import RewardMixture
from segalign.rewards.protocol import Reward


def reward_protocol(reward: Reward) -> dict[str, Any]:
    """Describe a reward that has been read.

    Two rewards with one description score equally. Of a function, and of a module from elsewhere,
    nothing but the name and the digest of the weights is known.

    Args:
        reward: The reward; a mixture is described part by part.
    """
    if isinstance(reward, RewardMixture):
        parts = {
            name: {"weight": reward.weights[name], **reward_protocol(part)}
            for name, part in reward.rewards.items()
        }
        return {"kind": _kind(reward), "parts": parts}
    if isinstance(reward, ClipReward):
        return _describe_clip(reward)
    known: dict[str, Any] = {"kind": _kind(reward)}
    if isinstance(reward, nn.Module):
        known["weights"] = tensors_digest(reward)
    return known


def direction_protocol(direction: Any) -> dict[str, Any] | None:
    """Describe an estimate of the common direction; None is none."""
    if direction is None:
        return None
    if isinstance(direction, CorpusDirection):
        facts = direction.provenance
        return {
            "kind": "corpus",
            "direction": _bytes_digest(direction.direction),
            "captions": facts.captions_digest,
            "num_captions": facts.num_captions,
        }
    known = {"kind": _kind(direction)}
    # One that is held has it in no state.
    if isinstance(held := getattr(direction, "direction", None), Tensor):
        known["direction"] = _bytes_digest(held)
    elif isinstance(direction, nn.Module):
        known["direction"] = tensors_digest(direction)
    return known


def tensors_digest(module: nn.Module) -> str:
    """Hash the names, types and values of a module's tensors, SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def _describe_clip(reward: ClipReward) -> dict[str, Any]:
    scorer = reward.scorer
    images = scorer.preprocessing
    return {
        "kind": _kind(reward),
        "weights": tensors_digest(scorer),
        "dtype": str(next(scorer.parameters()).dtype).removeprefix("torch."),
        "text": describe_text(scorer.segmenter),
        "cleaning": scorer.tower.cleaning,
        "images": {
            "input_size": images.settings.image_size,
            "mean": list(images.settings.mean),
            "std": list(images.settings.std),
            "resize": images.resize,
            "fit": images.settings.fit,
            "round_half": images.settings.round_half,
            "crop": images.crop,
        },
        "renormalize": reward.renormalize,
        "omega": reward.omega,
        "common_direction": direction_protocol(reward.common_direction),
    }


def _kind(thing: object) -> str:
    named: Any = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def _bytes_digest(tensor: Tensor) -> str:
    return hashlib.sha256(_raw(tensor)).hexdigest()


def _raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
