"""Schedule, sampler, codecs, caches and LoRA against closed forms and diffusers."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from segalign.diffusion.latent_cache import LatentCache
from segalign.diffusion.latents import PixelUnshuffleCodec, VAECodec
from segalign.diffusion.lora import LoraSettings
from segalign.diffusion.sampler import DDIMSampler
from segalign.diffusion.schedule import NoiseSchedule
from segalign.errors import ConfigError
from segalign.losses.diffusion import denoising_loss, min_snr_weights
from segalign.modes import evaluation_mode

SD15 = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
KINDS = ("epsilon", "v_prediction", "sample")


def schedule_of(kind):
    return NoiseSchedule.from_config({**SD15, "prediction_type": kind})


@pytest.mark.parametrize(
    "special",
    [
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"trained_betas": [0.001 + 0.00002 * i for i in range(1000)]},
        {"beta_schedule": "linear"},
    ],
    ids=["zero terminal SNR", "listed", "linear"],
)
def test_noise_levels_are_those_of_diffusers(special):
    theirs = DDIMScheduler(**{**SD15, **special}).alphas_cumprod
    ours = NoiseSchedule.from_config({**SD15, **special})
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs, atol=2e-6, rtol=2e-5)


def test_zero_terminal_snr_needs_a_parameterisation_that_bears_it():
    with pytest.raises(ConfigError, match="got epsilon, which says nothing of pure noise"):
        NoiseSchedule.from_config({**SD15, "rescale_betas_zero_snr": True})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("spacing", "steps_offset"), [("trailing", 0), ("leading", 1)])
def test_the_sampler_equals_diffusers(kind, spacing, steps_offset):
    theirs = DDIMScheduler(
        **SD15,
        prediction_type=kind,
        timestep_spacing=spacing,
        steps_offset=steps_offset,
        clip_sample=False,
        set_alpha_to_one=True,
    )
    theirs.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)
    mix = torch.randn(4, 4, generator=generator, dtype=torch.float64) / 4

    def network(latents, timestep):
        return torch.tanh(torch.einsum("ij,bjhw->bihw", mix, latents)) * (1 + timestep / 1000)

    expected = noise
    for timestep in theirs.timesteps:
        output = network(expected, int(timestep))
        expected = theirs.step(output, timestep, expected).prev_sample
    sampler = DDIMSampler(num_inference_steps=20, spacing=spacing)
    assert sampler.timesteps(1000) == theirs.timesteps.tolist()
    ours = sampler.sample(network, noise, schedule_of(kind))
    # diffusers keeps its tables in float32.
    assert torch.allclose(ours, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_network_recovers_the_image_in_any_number_of_steps(kind):
    schedule = schedule_of(kind)
    clean = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    noise = torch.randn(1, 2, 2, 2, dtype=torch.float64)

    def oracle(latents, timestep):
        at = torch.tensor([timestep])
        alpha, sigma = schedule.levels(at, latents)
        return schedule.training_target(clean, (latents - alpha * clean) / sigma, at)

    for steps in (1, 7, 50):
        ours = DDIMSampler(num_inference_steps=steps).sample(oracle, noise, schedule)
        assert torch.allclose(ours, clean, atol=1e-9)


def test_gradient_mode_is_an_argument():
    weight = torch.ones(1, requires_grad=True)
    sampler, schedule = DDIMSampler(num_inference_steps=3), schedule_of("epsilon")
    noise = torch.randn(1, 1, 2, 2)
    assert not sampler.sample(lambda x, t: x * weight, noise, schedule).requires_grad
    recorded = sampler.sample(lambda x, t: x * weight, noise, schedule, enable_grad=True)
    assert recorded.requires_grad


def test_official_spacing_of_fifty_steps():
    assert DDIMSampler(num_inference_steps=50).timesteps(1000) == list(range(999, 0, -20))


def test_settings_that_cannot_work():
    with pytest.raises(ConfigError, match="`num_inference_steps` must be at least 1; got 0"):
        DDIMSampler(num_inference_steps=0)
    with pytest.raises(ConfigError, match="must be <= 1000; got 1001"):
        DDIMSampler(num_inference_steps=1001).timesteps(1000)
    with pytest.raises(ConfigError, match="got `cosine`"):
        NoiseSchedule.from_config({"beta_schedule": "cosine"})
    with pytest.raises(ConfigError, match="`prediction_type` among epsilon, v_prediction, sample"):
        NoiseSchedule.from_config({"prediction_type": "flow"})


def test_min_snr_weights_are_those_of_the_clean_image_error():
    timesteps = torch.tensor([0, 500, 999])
    ratio = schedule_of("sample").alphas_cumprod[timesteps]
    snr = ratio / (1 - ratio)
    expected = snr.clamp(max=5)
    for kind, divisor in {"sample": 1, "epsilon": snr, "v_prediction": snr + 1}.items():
        weights = min_snr_weights(schedule_of(kind), timesteps, 5.0)
        assert torch.allclose(weights.double(), expected / divisor, rtol=1e-6)


def test_the_loss_is_per_sample():
    output, target = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    target[1] = 2
    assert denoising_loss(output, target).tolist() == [0, 4]


def test_pixel_codec_is_exact():
    codec = PixelUnshuffleCodec(6)
    images = torch.rand(2, 3, 36, 36, dtype=torch.float64)
    latents = codec.encode(images)
    assert tuple(latents.shape[1:]) == codec.latent_shape(36, 36) == (108, 6, 6)
    assert torch.allclose(codec.decode(latents), images, atol=1e-15)


def test_vae_codec_has_the_scale_of_its_config():
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    codec = VAECodec(vae)
    images = torch.rand(1, 3, 16, 16)
    latents = codec.encode(images)
    assert tuple(latents.shape[1:]) == codec.latent_shape(16, 16)
    mean = vae.encode(images * 2 - 1).latent_dist.mean
    assert torch.allclose(latents, mean * 0.18215)
    with torch.no_grad():
        expected = (vae.decode(mean).sample + 1) / 2
        assert torch.allclose(codec.decode(latents), expected, atol=1e-5)


class CountingCodec:
    def __init__(self):
        self.encoded = self.calls = 0

    def encode(self, images):
        self.calls += 1
        self.encoded += len(images)
        return images * 2


def test_the_latent_cache_recalls_and_is_bounded():
    codec, images = CountingCodec(), torch.rand(3, 1, 2, 2)
    cache = LatentCache(max_bytes=2 * 16)
    for _ in range(2):
        assert torch.equal(cache.encode(codec, images, [5, 6, 7], [True] * 3), images * 2)
    assert codec.encoded == 3 + 1  # the third did not fit
    assert cache.num_bytes == 32


def test_latents_do_not_depend_on_what_is_remembered():
    # This codec's latents, like the last bits of a real one's, depend on the whole batch.
    class BatchCodec(CountingCodec):
        def encode(self, images):
            return super().encode(images) + len(images)

    images = torch.arange(12.0).reshape(3, 1, 2, 2)
    fresh, used = (LatentCache(max_bytes=1000) for _ in range(2))
    used.encode(BatchCodec(), images[:2], [5, 6], [True] * 2)
    arguments = (BatchCodec(), images, [5, 6, 7], [True] * 3)
    assert torch.equal(used.encode(*arguments), fresh.encode(*arguments))
    assert LatentCache(0).encode(*arguments)[0, 0, 0, 0] == len(images)  # in one batch


def test_the_latent_cache_forgets_stand_ins_and_skips_needless_calls():
    codec, cache, image = CountingCodec(), LatentCache(max_bytes=1000), torch.ones(1, 1, 2, 2)
    cache.encode(codec, torch.zeros(1, 1, 2, 2), [5], [False])
    assert torch.equal(cache.encode(codec, image, [5], [True]), image * 2)
    assert torch.equal(cache.encode(codec, image, [5], [True]), image * 2)
    assert codec.encoded == 2
    assert codec.calls == 2


def test_the_latent_cache_forgets_what_is_not_finite():
    codec, cache, image = CountingCodec(), LatentCache(max_bytes=1000), torch.ones(1, 1, 2, 2)
    assert not cache.encode(codec, image / 0, [5], [True]).isfinite().any()
    assert cache.num_bytes == 0
    assert torch.equal(cache.encode(codec, image, [5], [True]), image * 2)


def tiny_unet():
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def test_lora_sits_on_the_official_targets_and_starts_as_the_identity():
    torch.manual_seed(0)
    unet = tiny_unet()
    inputs = torch.randn(1, 4, 4, 4), torch.tensor(3), torch.randn(1, 5, 6)
    before = unet(*inputs).sample
    LoraSettings(rank=2).add_to(unet)
    assert torch.allclose(unet(*inputs).sample, before, atol=1e-6)
    trained = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    modules = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained}
    assert modules == {
        "conv1",
        "conv2",
        "conv_shortcut",
        "time_emb_proj",
        "to_q",
        "to_k",
        "to_v",
        "0",
        "proj",
    }
    assert not any(part in name for name in trained for part in ("proj_in", "proj_out", "net.2"))


def test_evaluation_mode_restores_every_flag():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    model[1].eval()

    def fail_inside():
        with evaluation_mode(model):
            assert not model[0].training
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert model[0].training
    assert model.training
    assert not model[1].training
