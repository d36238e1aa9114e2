"""The networks of ``reward_step.py``, with random weights, and the inputs of its steps.

Dims: B batch, L text tokens, D text width, N inference steps.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from segalign.diffusion.generator import TextToImage
from segalign.diffusion.latents import VAECodec
from segalign.diffusion.lora import LoraSettings
from segalign.diffusion.model_sizes import SCHEDULER_CONFIG, draw_weights
from segalign.diffusion.pretrained import PretrainedModel
from segalign.diffusion.sampler import DDIMSampler
from segalign.diffusion.schedule import NoiseSchedule
from segalign.formats.clip_scorer import ClipScorer, ImageSettings
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.scorer_source import PretrainedScorer
from segalign.text.conditioning import TextConditioning, TextReport
from segalign.text.segmenter import SentenceSegmenter
from segalign.text.tokenizer import VOCAB_SIZE, clip_tokenizer
from segalign.types import CaptionBatch

NUM_SEGMENTS, GUIDANCE = 12, 7.5
WORDS = ("a", "red", "old", "house", "near", "the", "lake", "with", "tall", "trees", "and", "grey")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One size of the benchmark.

    Attributes:
        name: ``small``, ``sd15`` or ``quick``.
        channels: Of the UNet's levels.
        decoder_channels: Of the VAE's four levels; images are 8 times as wide as latents.
        latent_side: Side of the latents.
        text: (L, D).
        rank: Of the LoRA.
        batch_size: B.
        num_steps: N.
        num_train_steps: K.
        micro_batches: Pairs that our step replays, and images that it decodes, at a time.
        device: Where it runs.
    """

    name: str
    channels: tuple[int, ...] = ()
    decoder_channels: tuple[int, ...] = ()
    scorer_width: int = 0
    scorer_layers: int = 0
    latent_side: int
    text: tuple[int, int]
    rank: int
    batch_size: int
    num_steps: int = 50
    num_train_steps: int = 5
    micro_batches: tuple[int, int] = (1, 1)
    device: str = "cpu"


SETTINGS = {
    "small": Setting(
        name="small",
        channels=(48, 96, 224),
        decoder_channels=(32, 64, 128, 128),
        scorer_width=256,
        scorer_layers=6,
        latent_side=32,
        text=(480, 256),
        rank=16,
        batch_size=2,
    ),
    "quick": Setting(
        name="quick",
        channels=(8, 16),
        decoder_channels=(8, 8, 8, 8),
        scorer_width=16,
        scorer_layers=1,
        latent_side=4,
        text=(20, 16),
        rank=4,
        batch_size=2,
        num_steps=3,
        num_train_steps=2,
    ),
    "sd15": Setting(
        name="sd15", latent_side=64, text=(480, 768), rank=32, batch_size=8, micro_batches=(8, 2)
    ),
}


@dataclass(frozen=True)
class PreparedText:
    """Stands for the text encoder, which is the same for both steps and is not timed.

    Attributes:
        positive: Contexts of the captions, ``(B, L, D)``.
        negative: That of the empty caption, ``(1, L, D)``.
    """

    positive: Tensor
    negative: Tensor

    def encode_empty(self, batch_size: int) -> TextConditioning:
        """Return the negative prompt."""
        return conditioning(self.negative).expand(batch_size)


def conditioning(embeds: Tensor) -> TextConditioning:
    """Wrap contexts."""
    counts = (0,) * len(embeds)
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    return TextConditioning(embeds, mask, None, TextReport(counts, counts, counts, counts))


class PaddedReward:
    """The same reward, its texts padded to the context and encoded at each call."""

    def __init__(self, reward: ClipReward) -> None:
        self.reward = reward

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Score images, ``(B,)``: see ``Reward``."""
        model, tokenizer = self.reward.scorer.model, self.reward.scorer.tower.tokenizer
        split = [self.reward.split(caption) for caption in captions]
        texts = [text for one in split for text in one]
        tokens = tokenizer(
            texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).to(images.device)
        with torch.no_grad():
            states = model.text_model(**tokens).pooler_output
            features = F.normalize(model.text_projection(states), dim=-1)
            means = [part.mean(0) for part in features.split([len(one) for one in split])]
        return (self.reward.image_features(images) * torch.stack(means)).sum(-1)


@dataclass(frozen=True, eq=False)
class Models:
    """Networks and inputs of both steps.

    Attributes:
        setting: Their size.
        generator: UNet with LoRA, VAE and noise levels; its text encoder is a stand-in.
        reward: The segment-level score; equal texts are encoded once, in passes of like lengths.
        captions: ``B`` captions of 12 sentences.
        images: Images that no step needs, ``(B, 3, H, W)``.
    """

    setting: Setting
    generator: TextToImage
    reward: ClipReward
    captions: list[str]
    images: Tensor

    @classmethod
    def build(cls, setting: Setting) -> "Models":
        """Build everything from seeds."""
        torch.manual_seed(0)
        device = torch.device(setting.device)
        unet, codec = _generator_networks(setting)
        LoraSettings(rank=setting.rank).add_to(unet)
        _draw_lora(unet)
        codec.requires_grad_(False)
        length, width = setting.text
        drawn = torch.randn(setting.batch_size + 1, length, width).to(device)
        text: Any = PreparedText(drawn[1:], drawn[:1])
        generator = TextToImage(
            unet.to(device),
            text,
            codec.to(device),
            NoiseSchedule.from_config(SCHEDULER_CONFIG),
            image_size=8 * setting.latent_side,
            mask_padding=False,
        )
        reward = ClipReward(_scorer(setting), segmenter=SentenceSegmenter(), resize="bilinear")
        side = generator.image_size
        images = torch.rand(setting.batch_size, 3, side, side).to(device)
        return cls(setting, generator, reward.to(device), _captions(setting.batch_size), images)

    def in_float64(self) -> "Models":
        """Widen everything, in place but for the inputs."""
        generator = copy.copy(self.generator)
        text = self.text
        wide: Any = PreparedText(text.positive.double(), text.negative.double())
        generator.conditioner = wide
        for network in (generator.unet, generator.codec, self.reward):
            nn.Module.double(cast("nn.Module", network))
        return replace(self, generator=generator, images=self.images.double())

    @property
    def sampler(self) -> DDIMSampler:
        """Return the sampler, whose guidance scale is that of the paper."""
        return DDIMSampler(
            num_inference_steps=self.setting.num_steps, guidance_scale=GUIDANCE, spacing="official"
        )

    @property
    def text(self) -> PreparedText:
        """Return the contexts."""
        found: Any = self.generator.conditioner
        return found

    @property
    def batch(self) -> CaptionBatch:
        """Return the batch as a data module makes it."""
        size, device = self.setting.batch_size, self.images.device
        return {
            "sample_ids": torch.arange(size),
            "captions": self.captions,
            "valid": torch.ones(size, dtype=torch.bool, device=device),
            "epochs": torch.zeros(size, dtype=torch.int64),
            "metadata": [{}] * size,
        }

    def trained(self) -> list[nn.Parameter]:
        """List the LoRA's weights."""
        return [weight for weight in self.generator.unet.parameters() if weight.requires_grad]

    def precision(self) -> contextlib.AbstractContextManager[object]:
        """Compute in bfloat16 on a GPU."""
        if self.setting.device == "cpu":
            return contextlib.nullcontext()
        return torch.autocast(self.setting.device, torch.bfloat16)


@contextlib.contextmanager
def lora_dropout(unet: nn.Module, share: float) -> Iterator[None]:
    """Drop a share of what each adapter adds, in all calls, as the official code does."""
    hooks = []

    def drop(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.dropout(output, share, training=True)

    try:
        if share:
            hooks = [
                up.register_forward_hook(drop)
                for layer in unet.modules()
                if isinstance(layer, LoraLayer)
                for up in layer.lora_B.values()
            ]
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _generator_networks(setting: Setting) -> tuple[UNet2DConditionModel, VAECodec]:
    if setting.name == "sd15":
        source = PretrainedModel(
            init="random", size="sd15", dtype="bfloat16", channels_last=setting.device == "cuda"
        )
        bundle = source.load(setting.device)
        assert isinstance(bundle.codec, VAECodec)
        return bundle.unet, bundle.codec
    attended = len(setting.channels) - 1
    unet = UNet2DConditionModel(
        sample_size=setting.latent_side,
        block_out_channels=setting.channels,
        layers_per_block=1,
        # The coarsest level has no attention besides that of the middle.
        down_block_types=(*["CrossAttnDownBlock2D"] * attended, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * attended),
        cross_attention_dim=setting.text[1],
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=setting.decoder_channels,
        layers_per_block=1,
        norm_num_groups=8,
    ).eval()
    return unet, VAECodec(vae)


def _draw_lora(unet: nn.Module) -> None:
    """Start away from zero, where half of the gradient would be zero too."""
    for layer in unet.modules():
        if isinstance(layer, LoraLayer):
            for up in layer.lora_B.values():
                nn.init.normal_(up.weight, std=0.02)


def _scorer(setting: Setting) -> ClipScorer:
    if setting.name == "sd15":
        with torch.device(setting.device):
            scorer: Any = PretrainedScorer(model="vit-h-14", init="random").load()
        draw_weights(scorer.model, "scorer", seed=0)
        scorer.model.to(torch.bfloat16)
        return scorer
    width = setting.scorer_width
    shape = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": setting.scorer_layers,
        "num_attention_heads": 4,
    }
    tokens = {"bos_token_id": VOCAB_SIZE - 2, "eos_token_id": VOCAB_SIZE - 1}
    config = CLIPConfig(
        text_config={**shape, **tokens, "vocab_size": VOCAB_SIZE},
        vision_config={**shape, "image_size": 224, "patch_size": 32},
        projection_dim=width,
    )
    return ClipScorer(CLIPModel(config).eval(), clip_tokenizer(), ImageSettings(image_size=224))


def _captions(batch_size: int) -> list[str]:
    """Make captions of 12 sentences of 9 to 22 words, all different."""
    draw = torch.Generator().manual_seed(0)

    def sentence(number: int) -> str:
        length = 9 + int(torch.randint(14, (), generator=draw))
        chosen = torch.randint(len(WORDS), (length,), generator=draw).tolist()
        return f"{' '.join(WORDS[i] for i in chosen).capitalize()} {number}."

    return [" ".join(sentence(i) for i in range(NUM_SEGMENTS)) for _ in range(batch_size)]
