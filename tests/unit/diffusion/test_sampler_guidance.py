"""The guidance of samplers: checked when made, kept when changed, obeyed when sampling."""

import pytest
import torch

from segalign.diffusion.generator import TextToImage
from segalign.diffusion.guidance import Guidance
from segalign.diffusion.latents import PixelUnshuffleCodec
from segalign.diffusion.sampler import DDIMSampler, EulerSampler
from segalign.diffusion.schedule import NoiseSchedule
from segalign.diffusion.scheduler_sampler import SchedulerSampler, change_sampler
from segalign.errors import ConfigError

KINDS = [DDIMSampler, EulerSampler, SchedulerSampler]
GUIDED = {
    "guidance_scale": 3.0, "guidance_interval": (0.5, 1.0), "guidance_interval_unit": "fraction",
    "guidance_rescale": 0.7,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_interval": (200, 800)}, r"`interval` has no effect at `scale` 1; got \(200, 8"),
        ({"guidance_rescale": 0.7}, r"`rescale` has no effect at `scale` 1; got 0\.7"),
        ({**GUIDED, "guidance_interval": (800, 200)}, r"`interval` must be \(low, high\)"),
        ({**GUIDED, "guidance_interval_unit": "sigma"}, "`interval_unit` must be one of"),
        ({**GUIDED, "guidance_rescale": 1.5}, r"`rescale` must be in \[0, 1\]; got 1\.5"),
        ({"guidance_scale": -1.0}, r"`scale` must be at least 0; got -1\.0"),
    ],
)
def test_contradictions_are_refused_when_it_is_made(kind, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        kind(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_flat_settings_are_one_guidance(kind):
    expected = Guidance(scale=3.0, interval=(0.5, 1.0), interval_unit="fraction", rescale=0.7)
    assert kind(**GUIDED).guidance == expected
    assert kind().guidance == Guidance()


def test_changes_keep_the_rest():
    sampler = DDIMSampler(num_inference_steps=7, spacing="leading", eta=0.5, **GUIDED)
    fewer = change_sampler(sampler, num_inference_steps=3)
    assert fewer == DDIMSampler(num_inference_steps=3, spacing="leading", eta=0.5, **GUIDED)
    for name in ("unipc", "euler", "dpmpp"):
        other = change_sampler(sampler, name)
        assert (other.guidance, other.spacing) == (sampler.guidance, "leading")
    stronger = change_sampler(sampler, "unipc", guidance_scale=5.0).guidance
    assert stronger == Guidance(scale=5.0, interval=(0.5, 1.0), interval_unit="fraction",
                                rescale=0.7)  # fmt: skip


@pytest.mark.parametrize("name", [None, "unipc"])
def test_no_guidance_has_no_interval(name):
    off = change_sampler(DDIMSampler(**GUIDED), name, guidance_scale=1.0)
    assert off.guidance.interval is None
    assert off.guidance.rescale == 0


class Words:
    """Encodes captions to 1 and the negative prompt to 0."""

    def __call__(self, captions):
        return torch.ones(len(captions))

    def encode_empty(self, batch_size):
        return torch.zeros(batch_size)


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_obeys_interval_and_rescaling(kind):
    schedule = NoiseSchedule.from_config({"beta_schedule": "scaled_linear"})
    generator = TextToImage(
        None, Words(), PixelUnshuffleCodec(2), schedule, image_size=8, mask_padding=False
    )
    calls = []

    def predict(latents, timesteps, text):
        calls.append((int(timesteps), bool(text[0])))
        return latents.tanh() * (0.3 + 0.5 * text[0]) + text[0] * 0.1

    generator.predict = predict
    sampler = kind(num_inference_steps=5, **GUIDED)
    noise = generator.noise([0, 1], 7)
    images = generator.sample(["a", "b"], noise, sampler)
    timesteps = [timestep for timestep, guided in calls if guided]
    assert len(timesteps) == 5
    unguided = [timestep for timestep, guided in calls if not guided]
    assert unguided == [timestep for timestep in timesteps if timestep >= 0.5 * 999]
    assert 0 < len(unguided) < 5

    def denoise(latents, timestep):
        """Write rescaled guidance out (arXiv 2305.08891, eq. 15 and 16)."""
        at = torch.tensor(timestep)
        positive, negative = (predict(latents, at, torch.full((2,), v)) for v in (1.0, 0.0))
        if timestep < 0.5 * 999:
            return positive
        guided = negative + 3 * (positive - negative)
        stds = [x.flatten(1).std(1)[:, None, None, None] for x in (positive, guided)]
        return 0.7 * guided * stds[0] / stds[1] + 0.3 * guided

    expected = generator.codec.decode(sampler.sample(denoise, noise, schedule)).clamp(0, 1)
    assert torch.allclose(images, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05
