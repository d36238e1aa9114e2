import math

import pytest
import torch

from segalign.diffusion.schedule import NoiseSchedule
from segalign.errors import ConfigError
from segalign.losses.denoising_objective import DenoisingObjective
from segalign.rng import counter_normal, counter_uniform
from segalign.text.conditioning import TextConditioning, TextReport

KINDS = ("epsilon", "v_prediction", "sample")
COUNTERS = [(4, 0, 17), (4, 1, 3), (5, 0, 17)]
SEED = 9
GOLDEN = [0.3010181188583374, 0.7262505292892456, 0.7824876308441162]


@pytest.fixture
def latents():
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def text():
    embeds = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(1))
    report = TextReport((1,) * 3, (0,) * 3, (0,) * 3, (5,) * 3)
    return TextConditioning(embeds, torch.ones(3, 5, dtype=torch.bool), None, report)


def schedule_of(kind):
    return NoiseSchedule.from_config(
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        | {"prediction_type": kind}
    )


class Network:
    """Not linear in the latents; remembers its calls."""

    def __init__(self):
        self.weight = torch.tensor(0.7, requires_grad=True)
        self.calls = []

    def __call__(self, latents, timesteps, text):
        self.calls.append((latents, timesteps))
        shift = text.prompt_embeds.mean((1, 2)) + timesteps / 1000
        return torch.tanh(self.weight * latents + shift[:, None, None, None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_losses_written_out(kind, gamma, shift, latents, text):
    network, schedule = Network(), schedule_of(kind)
    objective = DenoisingObjective(seed=SEED, min_snr_gamma=gamma, timestep_shift=shift)
    found = objective.losses(network, schedule, latents, text, COUNTERS)
    ((noisy, timesteps),) = network.calls

    keys = [(SEED, *counter) for counter in COUNTERS]
    noise = counter_normal("training noise", keys, (2, 4, 4))
    for row, key in enumerate(keys):
        draw = counter_uniform("timestep", *key)
        timestep = math.floor(1000 * shift * draw / (1 + (shift - 1) * draw))
        assert timesteps[row] == timestep
        squared = float(schedule.alphas_cumprod[timestep])
        alpha, sigma = squared**0.5, (1 - squared) ** 0.5
        seen = alpha * latents[row] + sigma * noise[row]
        assert torch.allclose(noisy[row], seen, rtol=1e-6, atol=1e-6)
        target = {
            "epsilon": noise[row],
            "v_prediction": alpha * noise[row] - sigma * latents[row],
            "sample": latents[row],
        }[kind]
        output = torch.tanh(0.7 * seen + text.prompt_embeds[row].mean() + timestep / 1000)
        loss = (output - target).square().mean().item()
        if gamma is not None:
            ratio = squared / (1 - squared)
            of_clean = {"epsilon": ratio, "v_prediction": ratio + 1, "sample": 1}[kind]
            loss *= min(ratio, gamma) / of_clean
        assert found[row].item() == pytest.approx(loss, rel=1e-5)
    assert found.dtype == torch.float32
    assert found.shape == (3,)
    found.sum().backward()
    assert network.weight.grad != 0


def test_losses_of_a_known_run(latents, text):
    """The bits that supervised fine-tuning had before this was a piece of its own."""
    objective = DenoisingObjective(seed=SEED, min_snr_gamma=5.0, timestep_shift=2.0)
    found = objective.losses(Network(), schedule_of("epsilon"), latents, text, COUNTERS)
    expected = torch.tensor(GOLDEN)
    # Other processors sum in another order.
    torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=0)


def test_a_sample_has_its_draws_in_any_batch(latents, text):
    network, objective = Network(), DenoisingObjective(seed=SEED)
    objective.losses(network, schedule_of("epsilon"), latents, text, COUNTERS)
    objective.losses(network, schedule_of("epsilon"), latents[1:2], text, COUNTERS[1:2])
    (together, at), (alone, at_alone) = network.calls
    assert torch.equal(together[1:2], alone)
    assert torch.equal(at[1:2], at_alone)
    others = [DenoisingObjective(seed=SEED + 1), objective]
    for other, counters in zip(others, [COUNTERS, [(9, 9, 9)] * 3], strict=True):
        other.losses(network, schedule_of("epsilon"), latents, text, counters)
        assert not torch.equal(network.calls[-1][0], together)


def test_a_shift_prefers_noisy_timesteps(latents, text):
    counters = [(step, 0, 0) for step in range(200)]
    means = []
    for shift in (0.5, 1.0, 3.0):
        network = Network()
        many = latents[:1].expand(200, -1, -1, -1)
        whole = TextConditioning(
            text.prompt_embeds[:1].expand(200, -1, -1), text.attention_mask, None, text.report
        )
        DenoisingObjective(timestep_shift=shift).losses(
            network, schedule_of("epsilon"), many, whole, counters
        )
        means.append(network.calls[0][1].double().mean().item())
    assert means[0] < means[1] - 50 < means[2] - 100


@pytest.mark.parametrize("name", ["min_snr_gamma", "timestep_shift"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_settings_that_cannot_work(name, value):
    with pytest.raises(ConfigError, match=f"`{name}` must be above 0; got {value}"):
        DenoisingObjective(**{name: value})
