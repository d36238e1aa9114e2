"""The mean over valid samples of a whole optimizer step, and the modes of frozen parts."""

import functools

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_modules import training
from lightning_modules.training import TrainingModule
from segalign.errors import ConfigError, NonFiniteError
from segalign.sharded_tensors import local


class Slope(TrainingModule):
    """Loss of a sample is weight times x, so a step of SGD moves the weight by the mean x."""

    def __init__(self):
        super().__init__(functools.partial(torch.optim.SGD, lr=1.0), None)
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.frozen = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
        self.frozen.requires_grad_(False)
        self.trained = nn.Sequential(nn.Linear(1, 1), nn.Dropout())

    def training_step(self, batch, batch_idx):
        return self.reduce_losses(self.weight * batch["x"], batch)


def fit(batches, tmp_path):
    module = Slope()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=2,
        max_steps=len(batches) // 2,
        default_root_dir=tmp_path,
    )
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(module, loader)
    return module


def batch(values, valid):
    x = torch.tensor(values, dtype=torch.float64)
    return {"x": x, "valid": torch.tensor(valid), "sample_ids": torch.arange(len(x)) + 40}


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_a_step_averages_the_valid_samples_of_all_its_micro_batches(tmp_path):
    step = [batch([1.0, 2.0], [True, False]), batch([3.0, 4.0], [True, True])]
    assert fit(step, tmp_path).weight.item() == pytest.approx(-(1 + 3 + 4) / 3, rel=1e-12)
    # The counts start anew with every step, and a step without a valid sample moves nothing.
    nothing = [batch([9.0, 9.0], [False, False])] * 2
    both = fit([*step, *nothing, *step], tmp_path)
    assert both.weight.item() == pytest.approx(-2 * (1 + 3 + 4) / 3, rel=1e-12)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(tmp_path):
    bad = [batch([1.0, 2.0], [True, True]), batch([1.0, float("nan")], [True, True])]
    with pytest.raises(
        NonFiniteError, match=r"at step 1; got NaN or infinity for 1 samples \(41\)"
    ):
        fit([*[batch([1.0, 1.0], [True, True])] * 2, *bad], tmp_path)


def test_frozen_parts_stay_in_evaluation_mode():
    module = Slope().train()
    assert module.training
    assert module.trained[1].training
    assert not module.frozen[1].training


@pytest.mark.parametrize(("is_manual", "has_mesh"), [(False, True), (False, False), (True, True)])
def test_the_strategy_decides_who_averages_gradients_not_what_is_sharded(
    is_manual, has_mesh, mesh, monkeypatch
):
    module, seen = Slope(), []
    module.automatic_optimization = not is_manual
    module._device_mesh = mesh if has_mesh else None
    monkeypatch.setattr(training, "average_gradients", lambda weights: seen.append(len(weights)))
    module.on_before_optimizer_step(None)
    assert seen == ([3] if has_mesh and not is_manual else [])


def test_nothing_to_shard_is_refused_in_one_line(mesh):
    module = Slope()
    module.share_weights()
    module._device_mesh = mesh
    with pytest.raises(ConfigError, match=r"got none .*configs/base/ddp\.yaml") as refusal:
        module.share_weights()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("algorithm", "bound"), [("value", 0.5), ("norm", 2.5), (None, 2.5)])
def test_gradients_are_clipped_where_some_are_shards(algorithm, bound, mesh):
    module = Slope()
    module._device_mesh = mesh
    layer = module.trained[0]
    fully_shard(layer, mesh=mesh)
    module.weight.grad = torch.tensor([3.0], dtype=torch.float64)
    for weight, value in zip(layer.parameters(), (-4.0, 0.0), strict=True):
        weight.grad = torch.full_like(weight, value)
    module.configure_gradient_clipping(None, bound, algorithm)
    expected = [0.5, -0.5, 0.0] if algorithm == "value" else [1.5, -2.0, 0.0]
    found = [local(weight.grad).item() for weight in (module.weight, *layer.parameters())]
    assert found == pytest.approx(expected, rel=1e-6)


def test_averaged_weights_must_exist():
    with pytest.raises(ConfigError, match=r"the run keeps none\. Add callbacks\.ema\.EMA\."):
        Slope().weights("ema")
