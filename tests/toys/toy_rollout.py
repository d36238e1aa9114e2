"""A tiny network in float64, its rollout, and the gradient of that written out plainly.

Dims: B = 3 samples, latents (2, 4, 4), text width 3.
"""

import torch
from torch import nn

from segalign.diffusion.guidance import Guidance
from segalign.diffusion.schedule import NoiseSchedule
from segalign.truncation.chain import Chain
from segalign.truncation.denoiser import GuidedDenoiser

BATCH, SHAPE = 3, (2, 4, 4)
STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


class TinyNet(nn.Module):
    """Two convolutions that see latents, text and timestep; not linear in any of them."""

    def __init__(self, width=6):
        super().__init__()
        self.first = nn.Conv2d(2, width, 3, padding=1)
        self.text = nn.Linear(3, width)
        self.time = nn.Linear(2, width)
        self.last = nn.Conv2d(width, 2, 3, padding=1)
        self.double()

    def forward(self, latents, timesteps, text):
        phase = timesteps[:, None] / torch.tensor([100.0, 1000.0], dtype=torch.float64)
        shift = self.text(text) + self.time(phase.sin())
        return self.last(torch.tanh(self.first(latents) + shift[:, :, None, None]))


class FixedNoise:
    """Noise from a generator of its own."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.draws = torch.randn(64, BATCH, *SHAPE, generator=generator, dtype=torch.float64)

    def initial(self):
        return self.draws[0]

    def of_step(self, step_index):
        return self.draws[1 + step_index]

    def of_copy(self, copy_index):
        return self.draws[60 + copy_index]


class Lean:
    """A network for steps without gradient, and what happened, in order.

    Attributes:
        events: Timesteps of calls, and ``released``.
    """

    def __init__(self, denoiser, events=None):
        self.denoiser, self.events = denoiser, [] if events is None else events

    def __call__(self, latents, timestep):
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert "released" not in self.events
        self.events.append(timestep)
        return self.denoiser(latents, timestep)

    def release(self):
        self.events.append("released")


class Toy:
    """A network, texts, a schedule and a loss.

    Args:
        kind: What the network's output means.
        scale: Guidance.
        zero_snr: Whether the noisiest level has no signal.
    """

    def __init__(self, kind="epsilon", scale=3.0, *, zero_snr=False, **guidance):
        generator = torch.Generator().manual_seed(1)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.net = TinyNet()
        self.schedule = NoiseSchedule.from_config(
            STABLE_DIFFUSION | {"prediction_type": kind, "rescale_betas_zero_snr": zero_snr}
        )
        self.kind, self.guidance = kind, Guidance(scale=scale, **guidance)
        self.text = torch.randn(BATCH, 3, generator=generator, dtype=torch.float64)
        self.target = torch.randn(BATCH, *SHAPE, generator=generator, dtype=torch.float64)
        self.noise = FixedNoise()

    def network(self, text):
        def call(latents, timesteps, rows=None):
            return self.net(latents, timesteps, text if rows is None else text[rows])

        return call

    @property
    def denoiser(self):
        return GuidedDenoiser(
            conditional=self.network(self.text),
            unconditional=self.network(torch.zeros_like(self.text)),
            guidance=self.guidance,
        )

    def loss(self, latents, rows):
        """Neither linear nor quadratic, another one for each caption."""
        return (1 + torch.tanh(latents - self.target[rows])).square().flatten(1).mean(1)

    def chain(self, strategy, sampler, seed=0, step=0):
        plan = strategy.plan(sampler.num_inference_steps, seed, step)
        return Chain.of(sampler, self.schedule, plan)

    def run(self, engine, chain, **arguments):
        """Run an engine on fresh gradients; return them by name, and the report."""
        self.net.zero_grad()
        report = engine.run(chain, self.denoiser, self.noise, self.loss, **arguments)
        return self.gradients(), report

    def gradients(self):
        return {name: weight.grad.clone() for name, weight in self.net.named_parameters()}

    def plain_gradients(self, plan, timesteps, eta=0.0):
        """Write the run out in predicted noise and clean latents, and differentiate it."""
        self.net.zero_grad()
        levels = [float(self.schedule.alphas_cumprod[t]) for t in timesteps] + [1.0]
        latents = self.noise.initial()
        for index, timestep in enumerate(timesteps):
            now, then = levels[index], levels[index + 1]
            alpha, sigma = now**0.5, (1 - now) ** 0.5
            seen = latents.detach() if plan.detach_input else latents
            with torch.set_grad_enabled(index in plan.train_steps):
                eps = self._predicted_noise(seen, timestep, alpha, sigma)
            clean = (latents - sigma * eps) / alpha
            if index == plan.last_step:
                break
            injected = eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
            latents = then**0.5 * clean + (1 - then - injected**2) ** 0.5 * eps
            latents = latents + injected * self.noise.of_step(index)
        self.loss(clean, torch.arange(BATCH)).sum().backward()
        return self.gradients()

    def _predicted_noise(self, latents, timestep, alpha, sigma):
        timesteps = torch.full((BATCH,), timestep)
        guided = self.net(latents, timesteps, self.text)
        unguided = self.net(latents, timesteps, torch.zeros_like(self.text))
        output = unguided + self.guidance.scale * (guided - unguided)
        if self.kind == "epsilon":
            return output
        if self.kind == "v_prediction":
            return sigma * latents + alpha * output
        return (latents - alpha * output) / sigma


def largest_difference(ours, expected):
    """Largest relative difference in the L2 norm over the weights."""
    assert ours.keys() == expected.keys()
    return max(
        ((ours[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected
    )
