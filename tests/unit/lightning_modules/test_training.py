"""The mean over valid samples of a whole optimizer step, and the modes of frozen parts."""

import functools

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.distributed.fsdp import fully_shard

from callbacks.ema import EMA
from lightning_modules import training
from lightning_modules.training import TrainingModule
from segalign.errors import ConfigError
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


def fit(batches, tmp_path, module=None, micro_batches=2, **settings):
    module = module or Slope()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=micro_batches,
        max_steps=len(batches) // micro_batches,
        default_root_dir=tmp_path,
        **settings,
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


BAD = {
    "loss": (
        batch([1.0, float("nan")], [True, True]), "the losses of 1 samples are not finite", [41]
    ),
    # A row that does not count is no loss, and yet has a gradient: 0 times infinity.
    "gradient": (
        batch([1.0, float("inf")], [True, False]),
        "the losses are finite, and their gradient is not: `weight`",
        [40, 41, 40],
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_step_that_is_not_finite_is_skipped_with_all_its_micro_batches(
    case, is_first, tmp_path, caplog
):
    bad, reason, ids = BAD[case]
    good = [batch([1.0, 1.0], [True, True])] * 2
    other = batch([1.0, 2.0], [True, True])
    step = [bad, other] if is_first else [other, bad]
    module = fit([*good, *step], tmp_path)
    assert module.weight.item() == -1
    assert module.skipped.step == 1
    assert module.skipped.reason == reason
    assert sorted(module.skipped.sample_ids) == sorted(ids)
    assert caplog.messages.count(f"skipped on all ranks, {module.skipped}") == 1
    # The step after it is taken as ever.
    module = fit([*good, *step, *good], tmp_path)
    assert module.weight.item() == -2
    assert module.skipped is None


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("values", "start_scale", "is_counted"),
    [
        ([1.0, float("nan")], 2.0**16, True),
        # Finite losses whose gradients overflow by the scale are the scaler's affair, and others
        # are not.
        ([1e36, 1.0], 2.0**16, False),
        ([1.0, float("inf")], 1.0, True),
    ],
)
def test_the_scaler_of_float16_is_left_in_peace(fused, values, start_scale, is_counted, tmp_path):
    module = Slope()
    module.weight = nn.Parameter(torch.zeros(1))
    module.make_optimizer = functools.partial(torch.optim.AdamW, lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=start_scale)
    good = batch([1.0, 1.0], [True, True])
    bad = batch(values, [True, start_scale > 1])
    steps = [one | {"x": one["x"].float()} for one in (good, bad, good)]
    plugins, ema = [MixedPrecision("16-mixed", "cpu", scaler)], EMA(decay=0.5, warmup=False)
    fit(steps[:2], tmp_path, module, 1, plugins=plugins, callbacks=[ema])
    assert (module.skipped is not None) == is_counted
    assert module.is_left_out
    assert module.ema.state_dict()["weights"]["weight"].item() == pytest.approx(
        module.weight.item() / 2
    )
    assert scaler.get_scale() == start_scale / 2
    (state,) = module.trainer.optimizers[0].state.values()
    assert state["step"] == 1
    once = module.weight.item()
    fit(steps, tmp_path, module, 1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert not module.is_left_out
    assert module.weight.item() < once < 0


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
