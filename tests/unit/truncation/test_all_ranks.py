"""What keeps ranks in step: as many calls whatever the losses are."""

import pytest
import torch
from toy_rollout import BATCH, Toy, largest_difference

from segalign.diffusion.sampler import DDIMSampler
from segalign.errors import NonFiniteError
from segalign.truncation.draft import DRaFTLV
from segalign.truncation.drtune import DRTune
from segalign.truncation.graph import GraphEngine
from segalign.truncation.replay import ReplayEngine

ENGINES = [
    (ReplayEngine, {"micro_batch_size": 2, "loss_batch_size": 2}),
    (GraphEngine, {}),
    (GraphEngine, {"checkpoint": True, "micro_batch_size": 2}),
]


def calls_of(toy, engine, chain, **arguments):
    """Run; return all forward and backward passes in their order."""
    calls, scored = [], []

    def backward(loss, is_last):
        calls.append(("backward", is_last))
        loss.backward()

    loss = toy.loss

    def counted(latents, rows):
        scored.append(len(rows))
        return loss(latents, rows)

    hook = toy.net.first.register_forward_hook(
        lambda _, inputs, __: calls.append((len(inputs[0]), torch.is_grad_enabled()))
    )
    toy.loss = counted
    try:
        gradients, report = toy.run(engine, chain, backward=backward, **arguments)
    finally:
        hook.remove()
        toy.loss = loss
    return calls, scored, gradients, report


@pytest.mark.parametrize(("engine", "settings"), ENGINES)
@pytest.mark.parametrize("strategy", [DRTune(num_train_steps=2), DRaFTLV()], ids=repr)
@pytest.mark.parametrize("factor", [0.0, float("nan")])
def test_losses_that_teach_nothing_make_the_same_calls(engine, settings, strategy, factor):
    toy = Toy()
    chain = toy.chain(strategy, DDIMSampler(num_inference_steps=4))
    engine = engine(**settings, check_finite=False)
    calls, scored, expected, _ = calls_of(toy, engine, chain)
    loss = toy.loss
    toy.loss = lambda latents, rows: factor * loss(latents, rows)
    found_calls, found_scored, found, report = calls_of(toy, engine, chain)
    assert found_calls == calls
    assert found_scored == scored
    assert found.keys() == expected.keys()
    for gradient in (*found.values(), report.losses):
        if factor == 0:
            assert not gradient.any()
        else:
            assert gradient.isnan().any()


@pytest.mark.parametrize(("engine", "settings"), ENGINES)
def test_numbers_that_are_not_finite_are_refused_unless_told(engine, settings):
    toy = Toy()
    chain = toy.chain(DRTune(num_train_steps=2), DDIMSampler(num_inference_steps=4))
    expected, _ = toy.run(engine(**settings), chain)
    unchecked, _ = toy.run(engine(**settings, check_finite=False), chain)
    assert largest_difference(unchecked, expected) == 0
    loss = toy.loss
    toy.loss = lambda latents, rows: loss(latents, rows) / (rows != 1)
    with pytest.raises(NonFiniteError, match="finite losses of the reward"):
        toy.run(engine(**settings), chain)
    _, report = toy.run(engine(**settings, check_finite=False), chain)
    assert report.losses.isfinite().tolist() == [row != 1 for row in range(BATCH)]
