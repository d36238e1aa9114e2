"""SDXL's two towers, pooled text and image sizes: the picture of diffusers' own pipeline."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from segalign.diffusion.generator import TextToImage
from segalign.diffusion.latents import VAECodec
from segalign.diffusion.long_text_pipeline import LongTextPipeline
from segalign.diffusion.model_card import ModelCard
from segalign.diffusion.pipeline_folder import save_pipeline_folder
from segalign.diffusion.sampler import DDIMSampler
from segalign.diffusion.schedule import NoiseSchedule
from segalign.errors import ConfigError
from segalign.text.settings import T5Branch, TextEncoding
from segalign.text.text_models import TextModels
from segalign.text.tokenizer import clip_tokenizer

LEVELS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
CAPTIONS = ["a red fox on a wall", "two owls"]


def text_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=12, bos_token_id=49406, eos_token_id=49407, vocab_size=49408,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=16 + 12, attention_head_dim=2,
        addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        **LEVELS, beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="trailing"
    )
    made = StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=scheduler,
        text_encoder=CLIPTextModel(text_config(16)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(12)),
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(pad_token="!"),
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    made.unet.eval()
    made.vae.eval()
    made.text_encoder.eval()
    made.text_encoder_2.eval()
    return made


def generator(pipeline: StableDiffusionXLPipeline, text: TextEncoding) -> TextToImage:
    models = TextModels(
        text_model=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        text_model_2=pipeline.text_encoder_2,
        tokenizer_2=pipeline.tokenizer_2,
    )
    return TextToImage(
        pipeline.unet,
        text.build(text.complete(models, 28)),
        VAECodec(pipeline.vae),
        NoiseSchedule.from_config({**LEVELS, "beta_schedule": "scaled_linear"}),
        image_size=16,
        mask_padding=False,
    )


def test_short_prompts_give_the_pictures_of_diffusers(pipeline):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs = pipeline(
        CAPTIONS, latents=noise, num_inference_steps=3, guidance_scale=4.0, output_type="pt",
        height=16, width=16,
    ).images  # fmt: skip
    sampler = DDIMSampler(num_inference_steps=3, guidance_scale=4.0)
    ours = generator(pipeline, TextEncoding(kind="truncated")).sample(CAPTIONS, noise, sampler)
    assert ours.std() > 0.05
    # Their tables of noise levels are float32, ours float64.
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_long_captions_are_read_in_segments(pipeline):
    """Both towers read every segment, pooled features are the mean; a change at the end matters."""
    model = generator(pipeline, TextEncoding(token_budget=200, over_budget="proportional"))
    caption = " ".join(f"Object number {i} is a small blue box." for i in range(14))
    pair = model.conditioner([f"{caption} It is day.", f"{caption} It is night."])
    assert pair.prompt_embeds.shape == (2, 200, 28)
    assert pair.pooled.shape == (2, 12)
    noise = torch.zeros(2, 4, 8, 8)
    images = model.sample([f"{caption} Day.", f"{caption} Night."], noise, DDIMSampler())
    assert not torch.equal(images[0], images[1])


def test_a_context_without_pooled_features_is_refused(pipeline):
    text = TextEncoding(context="t5", t5=T5Branch(model="tiny", init="random", token_budget=8))
    model = generator(pipeline, text)
    with pytest.raises(ConfigError, match="expected pooled text features for this network"):
        model.sample(CAPTIONS, torch.zeros(2, 4, 8, 8), DDIMSampler(num_inference_steps=1))


def test_an_exported_folder_makes_the_same_pictures(pipeline, tmp_path):
    text = TextEncoding(token_budget=100)
    made = generator(pipeline, text)
    models = TextModels(
        text_model=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        text_model_2=pipeline.text_encoder_2,
        tokenizer_2=pipeline.tokenizer_2,
    )
    sampler = DDIMSampler(num_inference_steps=2, guidance_scale=3.0)
    model = SimpleNamespace(generator=made, text=text, text_models=models, sampler=sampler)
    card = ModelCard(
        base="tiny", trained="nothing", checkpoint="0", step=None, weights="raw", settings={}
    )
    save_pipeline_folder(model, tmp_path / "out", card)
    loaded = LongTextPipeline.from_pretrained(tmp_path / "out")
    captions = ["A red fox sits on a wall. It is night.", "Two owls."]
    images = loaded.generate(captions, [0, 1], eval_seed=5)
    expected = made.sample(captions, made.noise([0, 1], 5), sampler)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
