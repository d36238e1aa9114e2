"""Aesthetic rewards: a small head on the image features of a CLIP model; captions are ignored.

Dims: B batch, E joint-embedding width.

Reference: LAION's improved aesthetic predictor (v2, ``sac+logos+ava1-l14-linearMSE``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from typing_extensions import override

from segalign.errors import ConfigError, DataError
from segalign.formats.clip_scorer import ResizeFilter, Scorer, load_clip_scorer
from segalign.hub import fetch
from segalign.rewards.bound_reward import BoundReward, RewardTerms
from segalign.rewards.clip_reward import check_features
from segalign.rewards.protocol import FrozenReward, check_batch
from segalign.rewards.segment_scorer import SegmentScorer
from segalign.tensor_pickle import is_plain_tensor, read_tensor_pickle

_WIDTHS = (1024, 128, 64, 16, 1)
_DROPOUTS = (0.2, 0.2, 0.1)
_EXPECTED = "the head of an aesthetic predictor"
_REMEDY = "download it again"


class AestheticReward(FrozenReward):
    """How much people like an image on average, about 1 to 10.

    Args:
        scorer: The CLIP model; OpenAI's ViT-L/14 for the published heads. Its text tower idles.
        head: Maps unit image features ``(B, E)`` to ``(B, 1)``.
        resize: Filter; None is the model's own.
        crop: See ``ImagePreprocessing``.
        seed: Seed of the crop.

    Raises:
        DataError: If the head was made for features of another width.
    """

    def __init__(
        self,
        scorer: Scorer,
        head: nn.Sequential,
        *,
        resize: ResizeFilter | None = None,
        crop: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.scorer = SegmentScorer(scorer, resize=resize, crop=crop, seed=seed)
        self.head = head
        width = getattr(head[0], "in_features", self.scorer.width)
        if width != self.scorer.width:
            raise DataError(
                f"expected an aesthetic head for features of width {self.scorer.width}, the "
                f"model's; got {width}; give the CLIP model that it was trained on"
            )
        self.freeze()

    @override
    def set_step(self, step: int | None) -> None:
        """Tell the step of the crop: see ``FrozenReward``."""
        super().set_step(step)
        self.scorer.preprocessing.step = step

    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Score each image: see ``Reward``.

        Raises:
            DataError: If images and captions do not fit, or features are not finite.
            NonFiniteError: If an image is not finite.
        """
        check_batch(images, captions)
        self.freeze()
        return self._score(check_features(self.scorer.image_features(images), "image"), images)

    def bind(self, captions: Sequence[str]) -> BoundReward:
        """Score images without a look at captions or at whether they are finite: `bind_reward`."""
        return self._score_each

    def _score_each(self, images: Tensor, rows: Tensor) -> RewardTerms:
        self.freeze()
        return RewardTerms(self._score(self.scorer.image_features(images), images))

    def _score(self, features: Tensor, images: Tensor) -> Tensor:
        weight = next(self.head.parameters())
        scores: Tensor = self.head(features.to(weight.dtype))
        return scores.squeeze(-1).to(images.dtype)


def aesthetic_head(width: int = 768) -> nn.Sequential:
    """Build an untrained head of the published shape, linear but for dropout.

    Args:
        width: Of the image features, E.
    """
    layers: list[nn.Module] = []
    for number, out_width in enumerate(_WIDTHS):
        layers.append(nn.Linear(width, out_width))
        if number < len(_DROPOUTS):
            layers.append(nn.Dropout(_DROPOUTS[number]))
        width = out_width
    return nn.Sequential(*layers)


def load_aesthetic_head(path: Path) -> nn.Sequential:
    """Read a head; no code in its file can run.

    Args:
        path: Safetensors, or what ``torch.save`` wrote: tensors by name, ``layers.0.weight`` and so
            on.

    Raises:
        DataError: If it is damaged or of another shape.
    """
    weights = {k.removeprefix("layers."): v.float() for k, v in _read(path).items()}
    first = weights.get("0.weight")
    if first is None or first.ndim != 2:
        raise _unusable(path, f"tensors {', '.join(sorted(weights)[:3])}")
    head = aesthetic_head(first.shape[1])
    try:
        head.load_state_dict(weights)
    except RuntimeError as error:
        raise _unusable(path, " ".join(str(error).split()[:20])) from error
    return head


@dataclass(frozen=True, kw_only=True)
class Aesthetic:
    """LAION's aesthetic predictor v2: image quality alone.

    Args:
        model: Hub id or folder of the CLIP model that the head was trained on.
        head: File of the head, or a folder or hub id that holds it.
        file: The file in the folder.
        resize: Filter, ``bicubic`` or ``bilinear``; null is the model's own.
        crop: Side of the square that is cut out at a random place first (official: 504).
        seed: Seed of the crop.
    """

    model: str = "openai/clip-vit-large-patch14"
    head: str = "trl-lib/ddpo-aesthetic-predictor"
    file: str = "aesthetic-model.pth"
    resize: ResizeFilter | None = None
    crop: int | None = None
    seed: int = 0

    def load(self) -> AestheticReward:
        """Read both; each call makes another reward, which shares nothing.

        Raises:
            ConfigError: If one is not there.
            DataError: If one is damaged, or they do not fit.
        """
        head = load_aesthetic_head(self._find_head())
        return AestheticReward(
            load_clip_scorer(self.model), head, resize=self.resize, crop=self.crop, seed=self.seed
        )

    def _find_head(self) -> Path:
        path = Path(self.head).expanduser()
        if path.is_file():
            return path
        path = fetch(self.head, what=_EXPECTED, also=(self.file,)) / self.file
        if not path.is_file():
            raise ConfigError(
                f"expected {_EXPECTED} at `{path}`; there is no such file; name it as `file`"
            )
        return path


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            content: Any = load_file(path)
        except (SafetensorError, OSError) as error:
            raise _unusable(path, " ".join(str(error).split())) from error
    else:
        content = read_tensor_pickle(path, expected=_EXPECTED, remedy=_REMEDY)
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and is_plain_tensor(value) for name, value in content.items()
    ):
        raise _unusable(path, "other things than named tensors")
    return content


def _unusable(path: Path, found: str) -> DataError:
    return DataError(f"expected {_EXPECTED} in `{path}`; got {found}; {_REMEDY}")
