import lightning.pytorch as pl
import pytest
import torch
from toy_house import ToyData, ToyModule

from callbacks.checkpoint import RunCheckpoint, SafetensorsCheckpointIO
from callbacks.ema import EMA
from segalign.ema import TrainableEMA
from segalign.run_directory import newest_checkpoint
from segalign.run_format import read_tensors


def fit(run_dir, *callbacks, accumulate=1, max_steps=4, module=None):
    module = module or ToyModule()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
        plugins=[SafetensorsCheckpointIO()],
        callbacks=[*callbacks, RunCheckpoint()],
    )
    trainer.fit(module, ToyData())
    return module


@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_update_for_each_optimizer_step(run_dir, accumulate):
    module = fit(run_dir, EMA(), accumulate=accumulate)
    assert isinstance(module.ema, TrainableEMA)
    assert module.ema.num_updates == 4


class Follow(pl.Callback):
    """Average by hand, from the weights seen after each step."""

    def on_fit_start(self, trainer, pl_module):
        self.average = pl_module.head[1].weight.detach().clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        weight = pl_module.head[1].weight.detach()
        self.average = 0.75 * self.average + 0.25 * weight


def test_the_average_follows_the_weights(run_dir):
    follow = Follow()
    module = fit(run_dir, EMA(decay=0.75, warmup=False), follow)
    # Four float32 updates, by lerp here and by sums there.
    torch.testing.assert_close(
        module.ema.weights["head.1.weight"], follow.average, rtol=1e-6, atol=1e-7
    )


def test_the_average_is_saved_under_parameter_names_and_is_no_submodule(run_dir):
    module = fit(run_dir, EMA())
    saved = read_tensors(newest_checkpoint(run_dir) / "ema.safetensors")
    assert saved.keys() == module.ema.weights.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor, module.ema.weights[name])
    assert not [name for name in module.state_dict() if name.startswith("ema")]


def test_without_the_callback_there_is_no_average(run_dir):
    module = fit(run_dir)
    assert module.ema is None
    assert not (newest_checkpoint(run_dir) / "ema.safetensors").exists()
