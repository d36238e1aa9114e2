"""The denoising loss beside a reward: its gradient is that of the equation."""

import pytest
import torch
from toy_tuning import CAPTIONS, CODEC, IDS, base, batch, generator, gradients, largest_difference

from segalign.errors import ConfigError
from segalign.losses.denoising_objective import DenoisingObjective
from segalign.reward_tuning.denoising import denoising_gradient
from segalign.rng import counter_normal, counter_uniform

OBJECTIVE, WEIGHT, STEP = DenoisingObjective(seed=9), 0.25, 6
EPOCHS = [0, 0, 1, 2]


def data(valid=(True, True, True, True), images=True):
    made = batch(valid)
    made["epochs"] = torch.tensor(EPOCHS)
    if images:
        shape = (4, 3, 32, 32)
        random = torch.Generator().manual_seed(2)
        made["images"] = torch.rand(shape, generator=random, dtype=torch.float64)
    return made


def find(model, made, size=None, backwards=None):
    def backward(loss, _is_last):
        (backwards if backwards is not None else []).append(loss.item())
        loss.backward()

    model.unet.zero_grad(set_to_none=True)
    losses = denoising_gradient(
        model, OBJECTIVE, made, read(), STEP, weight=WEIGHT, batch_size=size, backward=backward
    )
    return gradients(model.unet), losses


def read():
    """Encode the captions, as the step does that the loss is a part of."""
    with torch.no_grad():
        return base()[1](CAPTIONS)


def written_out(model, made, rows):
    """``weight / B * sum over rows of mean (net(alpha x + sigma eps) - eps)^2``."""
    model.unet.zero_grad(set_to_none=True)
    keys = [(9, STEP, epoch, sample) for epoch, sample in zip(EPOCHS, IDS, strict=True)]
    timesteps = torch.tensor([int(1000 * counter_uniform("timestep", *key)) for key in keys])
    noise = counter_normal("training noise", keys, (4, 4, 4)).double()
    squared = model.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    latents = squared.sqrt() * CODEC.encode(made["images"]) + (1 - squared).sqrt() * noise
    text = read().prompt_embeds.double()
    output = model.unet(latents[rows], timesteps[rows], encoder_hidden_states=text[rows]).sample
    losses = WEIGHT * (output - noise[rows]).square().flatten(1).mean(1)
    (losses.sum() / len(EPOCHS)).backward()
    return gradients(model.unet), losses.detach()


@pytest.mark.parametrize("size", [None, 3, 1])
def test_the_gradient_is_that_of_the_equation(size):
    model, made, backwards = generator(), data(), []
    expected, losses = written_out(model, made, [0, 1, 2, 3])
    ours, found = find(model, made, size, backwards)
    assert largest_difference(ours, expected) <= 1e-6  # losses are float32
    torch.testing.assert_close(found.double(), losses, rtol=1e-6, atol=0)
    assert not found.requires_grad
    assert len(backwards) == {None: 1, 3: 2, 1: 4}[size]
    assert sum(backwards) == pytest.approx(losses.sum().item() / 4, rel=1e-6)


@pytest.mark.parametrize("size", [None, 1])
def test_rows_that_are_not_valid_add_nothing(size):
    model = generator()
    expected, losses = written_out(model, data(), [0, 2, 3])
    ours, found = find(model, data((True, False, True, True)), size)
    assert largest_difference(ours, expected) <= 1e-6
    assert found[1] == 0
    torch.testing.assert_close(found[[0, 2, 3]].double(), losses, rtol=1e-6, atol=0)


def test_it_is_added_to_what_is_there():
    model, made = generator(), data()
    once, _ = find(model, made)
    denoising_gradient(
        model, OBJECTIVE, made, read(), STEP, weight=WEIGHT, batch_size=None,
        backward=lambda loss, _is_last: loss.backward(),
    )  # fmt: skip
    doubled = {name: 2 * gradient for name, gradient in once.items()}
    assert largest_difference(gradients(model.unet), doubled) <= 1e-6


def test_captions_alone_are_refused():
    message = r"^expected images for `diffusion_weight`; got captions alone; set "
    with pytest.raises(ConfigError, match=message):
        find(generator(), data(images=False))
