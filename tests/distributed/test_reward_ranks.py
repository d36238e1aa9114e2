"""Reward fine-tuning on two ranks is that of one rank on their joined batch."""

import datetime as dt
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPModel

from lightning_modules.reward_finetuning import RewardFineTuningModule
from segalign.diffusion.lora import LoraSettings
from segalign.diffusion.pretrained import PretrainedModel
from segalign.diffusion.sampler import DDIMSampler
from segalign.errors import SegalignError
from segalign.formats.clip_scorer import ClipScorer, ImageSettings
from segalign.reward_tuning.settings import StepMemory
from segalign.rewards.batch_directions import BatchDirection
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.mixture import RewardMixture, WeightedReward
from segalign.rng import counter_normal
from segalign.text.segmenter import SentenceSegmenter
from segalign.text.settings import TextEncoding
from segalign.text.tokenizer import clip_tokenizer
from segalign.trainable import trainable_parameters
from segalign.truncation.drtune import DRTune

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]

CAPTIONS = ["A red fox sits. It is night.", "Two owls.", "A green house.", "A dog. It runs.",
            "Rain.", "A hut. Mist. An elk.", "A bee.", "Snow falls. It is cold."]  # fmt: skip
# By batch: a row of the second rank does not count, then none of it does.
TRAINED = [5 * [True] + [False, True, True], [True, True, False, True] + 4 * [False]]
EVALUATED = [5 * [True] + 3 * [False], [True, True, False, True] + 4 * [False]]
TOLERANCES = {"64-true": 1e-10, "32-true": 5e-5}
BROKEN = "A bee."  # of the second rank


class ToyReward:
    """A decomposed reward, V of each batch, beside one that fails for a caption at a step."""

    def __init__(self, *, nan_at=None, seed=0):
        self.nan_at, self.seed = nan_at, seed

    def load(self):
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        shape["num_attention_heads"] = 2
        text = shape | {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
        vision = shape | {"image_size": 16, "patch_size": 8}
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
        reward = ClipReward(
            ClipScorer(model.eval(), clip_tokenizer(), ImageSettings(image_size=16)),
            segmenter=SentenceSegmenter(),
            common_direction=BatchDirection(),
            omega=0.3,
        )
        parts = {"text": WeightedReward(reward=reward)}
        if self.nan_at is not None:
            parts["fails"] = WeightedReward(reward=Fails(self.nan_at))
        return RewardMixture(parts)


class Fails(torch.nn.Module):
    """How bright images are; NaN for one caption at one step."""

    def __init__(self, at_step):
        super().__init__()
        self.at_step, self.step = at_step, -1

    def set_step(self, step):
        self.step = step

    def forward(self, images, captions):
        found = [self.step == self.at_step and caption == BROKEN for caption in captions]
        return torch.where(torch.tensor(found), torch.nan, images.mean(dim=(1, 2, 3)))


class Shares(pl.LightningDataModule):
    """Global batches of which each rank sees its own rows."""

    def __init__(self, captions=CAPTIONS):
        super().__init__()
        self.captions = captions

    def loader(self, all_valid):
        trainer, batches = self.trainer, []
        size = len(CAPTIONS) // trainer.world_size
        rows = slice(trainer.global_rank * size, (trainer.global_rank + 1) * size)
        for number, valid in enumerate(all_valid):
            ids = torch.arange(len(CAPTIONS)) + 100 * number
            batches.append({
                "sample_ids": ids[rows],
                "captions": self.captions[rows],
                "valid": torch.tensor(valid)[rows],
                "epochs": torch.zeros(size, dtype=torch.int64),
                "metadata": [{}] * size,
            })  # fmt: skip
        return DataLoader(batches, batch_size=None)

    def train_dataloader(self):
        return self.loader(TRAINED)

    def val_dataloader(self):
        return self.loader(EVALUATED)


class Tuning(RewardFineTuningModule):
    """Adapters that change something from the start; an error is written down by every rank."""

    def configure_model(self):
        super().configure_model()
        for number, (name, weight) in enumerate(trainable_parameters(self).items()):
            if "lora_B" in name:
                noise = counter_normal("toy adapters", [(number,)], tuple(weight.shape))[0]
                weight.data.copy_(0.1 * noise)

    def training_step(self, batch, batch_idx):
        start = cloned(trainable_parameters(self))
        try:
            super().training_step(batch, batch_idx)
        except SegalignError as error:
            weights = cloned(trainable_parameters(self))
            keep(self.trainer, error=str(error), start=start, weights=weights)
            self.trainer.strategy.barrier()  # the first to end would take the other with it
            raise


def cloned(named):
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def keep(trainer, **found):
    torch.save(found, f"{trainer.default_root_dir}/{trainer.global_rank}.pt")


class Watch(pl.Callback):
    """Write every rank's findings: processes end with their runs."""

    def __init__(self):
        self.gradients, self.collectives, self.skipped = [], [], []

    def on_train_start(self, trainer, pl_module):
        self.start = cloned(trainable_parameters(pl_module))
        if trainer.world_size == 1:
            return
        reduce, calls = distributed.all_reduce, self.collectives

        def all_reduce(tensor, *arguments, **options):
            calls.append((trainer.global_step, tensor.numel()))
            return reduce(tensor, *arguments, **options)

        def of_ddp(_state, bucket):
            calls.append((trainer.global_step, bucket.buffer().numel()))
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        distributed.all_reduce = all_reduce
        trainer.strategy.model.register_comm_hook(None, of_ddp)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        trained = trainable_parameters(pl_module)
        moved = {name: w.grad for name, w in trained.items() if w.grad is not None}
        self.gradients.append(cloned(moved))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        found = pl_module.skipped
        self.skipped.append(found and [found.step, found.reason, list(found.sample_ids)])

    def on_train_end(self, trainer, pl_module):
        assert trainer.global_step == 2
        keep(
            trainer,
            start=self.start,
            weights=cloned(trainable_parameters(pl_module)),
            gradients=self.gradients,
            collectives=self.collectives,
            skipped=self.skipped,
            metrics=cloned(trainer.callback_metrics),
        )


def train(devices, folder, precision, reward=ToyReward(), captions=CAPTIONS):  # noqa: B008
    """Train two steps and evaluate; return what each rank has found."""
    torch.manual_seed(0)
    module = Tuning(
        PretrainedModel(init="random", size="tiny"),
        reward,
        partial(torch.optim.SGD, lr=1.0),
        text=TextEncoding(kind="segments", token_budget=77),
        lora=LoraSettings(rank=2),
        strategy=DRTune(num_train_steps=2),
        rollout_sampler=DDIMSampler(num_inference_steps=4, guidance_scale=3.0, eta=0.5),
        sampler=DDIMSampler(num_inference_steps=2, guidance_scale=2.0),
        max_grad_norm=None,
        memory=StepMemory(rollout_batch_size=3, decode_batch_size=2),
        held_out={"other": ToyReward(seed=1)},
    )
    ranks = DDPStrategy(
        start_method="fork",
        process_group_backend="gloo",
        timeout=dt.timedelta(seconds=60),
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=ranks if devices > 1 else "auto",
        precision=precision,
        max_steps=2,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Watch()],
        default_root_dir=folder,
    )
    trainer.fit(module, Shares(captions))
    return results(folder, devices)


def results(folder, devices=2):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(devices)]


def error_of(found, wanted):
    """Relative distance of named tensors."""
    assert found.keys() == wanted.keys()
    pairs = [(found[name].double(), tensor.double()) for name, tensor in wanted.items()]
    distance = sum((one - other).square().sum() for one, other in pairs)
    return (distance / sum(other.square().sum() for _, other in pairs)).sqrt().item()


@pytest.mark.parametrize("precision", TOLERANCES)
def test_two_ranks_tune_as_one(precision, tmp_path: Path):
    tolerance = TOLERANCES[precision]
    (one,) = train(1, tmp_path, precision)
    size = sum(weight.numel() for weight in one["weights"].values())
    moved = {name: one["weights"][name] - old for name, old in one["start"].items()}
    for two in train(2, tmp_path, precision):
        assert error_of(two["start"], one["start"]) == 0
        for found, wanted in zip(two["gradients"], one["gradients"], strict=True):
            assert error_of(found, wanted) <= tolerance
            assert all(gradient.count_nonzero() for gradient in wanted.values())
        ours = {name: two["weights"][name] - old for name, old in two["start"].items()}
        assert error_of(ours, moved) <= 10 * tolerance
        assert error_of(two["weights"], one["weights"]) <= tolerance
        # One collective for each gradient; all others are of a few numbers.
        large = [step for step, numel in two["collectives"] if numel > size / 100]
        assert large == [0, 1]
        assert (0, size) in two["collectives"]
        compare_metrics(two["metrics"], one["metrics"], tolerance)


def compare_metrics(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    # Of this rank alone, or of the clock.
    local = ("train/step_grad_norm/", "train/images_per_second", "train/tflops_per_second")
    compared = {name for name in wanted if not name.startswith(local)}
    assert {
        "train/reward_mean",
        "train/grad_norm",
        "val/reward_mean",
        "val/held_out/other",
    } < compared
    for name in compared:
        # Lightning's means are float32.
        assert found[name].item() == pytest.approx(
            wanted[name].item(), rel=max(tolerance, 1e-6), abs=1e-7
        ), name


def test_a_reward_that_fails_on_one_rank_lets_both_skip_the_step(tmp_path: Path):
    ranks = train(2, tmp_path, "32-true", ToyReward(nan_at=0))
    for rank in ranks:
        # Of two steps, the first one had no gradient, and so changed nothing.
        first, second = rank["gradients"]
        assert (len(first), len(second)) == (0, len(rank["weights"]))
        assert rank["skipped"] == ranks[0]["skipped"]
        (step, reason, ids) = rank["skipped"][0]
        assert rank["skipped"][1:] == [None]
        assert (step, ids) == (0, [6])
        assert reason.startswith("the losses of 1 samples are not finite (rank 1: the reward: ")
        assert "`fails`" in reason
        for name, weight in rank["weights"].items():
            # Steps of SGD at rate 1.
            assert torch.equal(weight, rank["start"][name] - second[name])
            assert torch.equal(weight, ranks[0]["weights"][name])


def test_a_blank_caption_of_one_rank_ends_both_before_a_weight_moves(tmp_path: Path):
    captions = [" " if caption == BROKEN else caption for caption in CAPTIONS]
    with pytest.raises(Exception, match="Error: expected"):
        train(2, tmp_path, "32-true", captions=captions)
    for rank in results(tmp_path):
        assert rank["error"].startswith(
            "expected captions with text for a reward; got blank ones for samples 6; "
        )
        assert error_of(rank["weights"], rank["start"]) == 0
