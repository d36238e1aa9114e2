"""Runs of tiny modules under each strategy, in processes that are forked once for many of them."""

import contextlib
import copy
import os
import socket
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import multiprocessing
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from toy_scorer import toy_batches, toy_caption
from toy_tuning import ClipSource, TinyBase, ToyCodec, text_models

from callbacks.best_checkpoint import stored_weights
from callbacks.checkpoint import RunCheckpoint, SafetensorsCheckpointIO
from callbacks.ema import EMA
from callbacks.fid import FID
from callbacks.image_evaluation import ImageEvaluation
from callbacks.lpips import LPIPS
from lightning_modules.long_text_diffusion import LongTextDiffusionModule
from lightning_modules.reward_finetuning import RewardFineTuningModule
from lightning_modules.scenes_scorer import ScenesScorerModule
from lightning_modules.segment_preference import SegmentPreferenceModule
from lightning_modules.sharded_strategy import ShardedStrategy
from segalign.data.scene_shards import ScenesShards
from segalign.diffusion.lora import LoraSettings
from segalign.diffusion.rollout import RolloutSettings
from segalign.diffusion.sampler import DDIMSampler
from segalign.losses.objective import PreferenceObjective
from segalign.metrics.extractors.tiny import TinyExtractor
from segalign.metrics.perceptual.tiny import TinyPerceptual
from segalign.reward_tuning.settings import PenaltySettings, StepMemory
from segalign.rewards.scorer_source import PretrainedScorer
from segalign.rewards.trained_parts import TrainedParts
from segalign.rng import counter_normal
from segalign.run_directory import checkpoint_path
from segalign.scenes.samples import make_sample
from segalign.scenes.scorers import ScenesScorer
from segalign.text.settings import TextEncoding
from segalign.trainable import trainable_parameters
from segalign.truncation.drtune import DRTune

ROWS = 4  # of a step, over all ranks
INVALID = {1: 3}  # step -> row that does not count
PROBS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.3]])
ADAMW = partial(torch.optim.AdamW, lr=1e-3)
# Moved by the length of a gradient, which AdamW is not: for clipping.
SGD = partial(torch.optim.SGD, lr=50.0, momentum=0.9)
MAX_NORM = 1e-4


class OwnCodec(ToyCodec):
    """Decodes in its own precision, as real ones do."""

    def decode(self, latents):
        return super().decode(latents.to(self.first.weight))


@dataclass(frozen=True)
class OwnBase(TinyBase):
    """The tiny base with a text model of its own, whose precision may change.

    The network of the second rank differs, as one does that is drawn at random.
    """

    def load(self):
        own = {"text_models": copy.deepcopy(text_models()), "codec": OwnCodec().float()}
        loaded = replace(super().load(), **own)
        with torch.no_grad():
            for weight in loaded.unet.parameters():
                weight.add_(int(os.environ.get("LOCAL_RANK", "0")))
        return loaded


def stage_one(optimizer=ADAMW, dtype=torch.float32, **settings):
    return LongTextDiffusionModule(
        OwnBase(dtype),
        optimizer,
        text=TextEncoding(token_budget=8),
        sampler=DDIMSampler(num_inference_steps=2, guidance_scale=2.0),
        **settings,
    )


def reward(**settings):
    return RewardFineTuningModule(
        OwnBase(),
        ClipSource(),
        SGD,
        text=TextEncoding(token_budget=8),
        strategy=DRTune(num_train_steps=2),
        rollout_sampler=DDIMSampler(num_inference_steps=3, guidance_scale=2.0, eta=0.5),
        sampler=DDIMSampler(num_inference_steps=2, guidance_scale=2.0),
        max_grad_norm=MAX_NORM,
        memory=StepMemory(rollout_batch_size=1),
        rollout=RolloutSettings(cache_text=True),
        penalty=PenaltySettings(weight=0.5),
        **settings,
    )


def preference(**settings):
    return SegmentPreferenceModule(
        ADAMW,
        scorer=PretrainedScorer(model="tiny", init="random"),
        objective=PreferenceObjective(pairwise=1, segment_contrastive=1),
        **settings,
    )


def scenes(**settings):
    scorer = ScenesScorer(weights="random")
    return ScenesScorerModule(ADAMW, scorer=scorer, reading_weight=0.5, max_noise=0.1, **settings)


LORA = LoraSettings(rank=2)
MODULES = {
    "stage one": stage_one,
    "stage one, LoRA": partial(stage_one, SGD, lora=LORA),
    "stage one, LoRA over bfloat16": partial(stage_one, lora=LORA, dtype=torch.bfloat16),
    "preference": partial(
        preference, chunk_size=1, trained=TrainedParts(gradient_checkpointing=True)
    ),
    "reward": reward,
    "reward, LoRA": partial(reward, lora=LORA),
}
# Of a loss that depends on which samples a rank has.
BY_RANK = {"scenes": scenes}


@dataclass(frozen=True)
class Run:
    """A run to be made: of which module, under which strategy, from where to where."""

    module: str
    strategy: str  # ddp, sharded, one
    steps: int
    start: Path | None = None
    name: str = ""
    is_cut: bool = False

    @property
    def micro_batches(self) -> int:
        """How many of them each rank adds up in a step; in one run, all steps have equally many."""
        is_apart = self.strategy == "one" and self.start is None
        return 2 if self.is_cut or (is_apart and self.module.startswith("stage")) else 1

    @property
    def folder(self) -> str:
        return f"{self.module}; {self.strategy}{self.name}"


class Steps(pl.LightningDataModule):
    """A global batch for each step, the same in every world; each rank sees its own rows."""

    def __init__(self, kind, micro_batches):
        super().__init__()
        self.kind, self.micro_batches = kind, micro_batches

    def batch(self, step, rows):
        ids = [ROWS * step + row for row in rows]
        valid = torch.tensor([INVALID.get(step) != row for row in rows])
        if self.kind == "scenes":
            return scene_batch(ids, valid)
        if self.kind == "preference":
            (made,) = toy_batches(len(ids), len(ids), "preference")
            made["preference_probs"] = PROBS[torch.tensor(ids) % len(PROBS)]
            made["image_pairs"] = counter_normal("pairs", [(one,) for one in ids], (2, 3, 16, 16))
        else:
            made = {
                "epochs": torch.zeros(len(ids), dtype=torch.int64),
                "metadata": [{}] * len(ids),
                "images": counter_normal("images", [(one,) for one in ids], (3, 32, 32)),
            }
        return made | {
            "sample_ids": torch.tensor(ids),
            "captions": [toy_caption(one) for one in ids],
            "valid": valid,
        }

    def loader(self, steps):
        world, rank = self.trainer.world_size, self.trainer.global_rank
        parts = world * self.micro_batches
        size = ROWS // parts
        mine = range(rank * self.micro_batches, (rank + 1) * self.micro_batches)
        return DataLoader(
            [
                self.batch(step, range(part * size, (part + 1) * size))
                for step in steps
                for part in mine
            ],
            batch_size=None,
        )

    def train_dataloader(self):
        return self.loader(range(self.trainer.global_step, 100))

    def val_dataloader(self):
        return self.loader([200])


def scene_batch(ids, valid):
    samples = [make_sample("3x3", 9, one, length="short") for one in ids]
    images = torch.stack([torch.from_numpy(sample.image.copy()) for sample in samples])
    return {
        "images": images.permute(0, 3, 1, 2).double() / 255,
        "captions": [sample.caption for sample in samples],
        "metadata": [sample.metadata for sample in samples],
        "sample_ids": torch.tensor(ids),
        "valid": valid,
        "epochs": torch.zeros(len(ids), dtype=torch.int64),
    }


class CountedFiles(SafetensorsCheckpointIO):
    """Counts the checkpoints that this rank writes."""

    num_saved = 0

    def save_checkpoint(self, *arguments, **options):
        self.num_saved += 1
        super().save_checkpoint(*arguments, **options)


def evaluation(shards):
    """Measure images of three captions, two at a time: ranks have unequally many of their own."""
    return [
        ImageEvaluation(num_captions=3, images_per_caption=2, batch_size=2, shards=str(shards)),
        FID(TinyExtractor(num_features=2), reference=str(shards)),
        LPIPS(TinyPerceptual()),
    ]


class Watch(pl.Callback):
    """Notes losses, images by weights of now and of before, and how each weight lies at the end."""

    def __init__(self, is_drawing):
        self.is_drawing = is_drawing
        self.losses, self.images, self.is_sharded, self.trained = [], [], {}, []
        self.values = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(trainer.callback_metrics["train/loss"].item())
        if trainer.global_step == 2 and not self.images:
            self.draw(pl_module, "raw", "ema")

    def draw(self, pl_module, *which):
        if self.is_drawing:
            pairs = ["A fox.", "Two owls."], [1, 2], 5
            self.images += [pl_module.generate(*pairs, weights) for weights in which]

    def on_train_end(self, trainer, pl_module):
        for callback in trainer.callbacks:
            if isinstance(callback, ImageEvaluation):
                self.values = dict(callback.outcome.values)
        self.is_sharded = {
            name: isinstance(weight, DTensor) for name, weight in pl_module.named_parameters()
        }
        self.trained = sorted(trainable_parameters(pl_module))
        second = checkpoint_path(Path(trainer.default_root_dir), 2)
        if trainer.global_step == 3 and second.is_dir():
            for weights in ("raw", "ema"):
                with stored_weights(pl_module, second, weights):
                    self.draw(pl_module, "raw")
            self.draw(pl_module, "raw")


def widen(module):
    """Make a module float64 before a checkpoint is loaded; the plugin does so only after."""
    configure = module.configure_model

    def configure_model():
        configure()
        module.double()

    module.configure_model = configure_model


@contextlib.contextmanager
def as_on_cuda(is_mixed):
    """Operate on many tensors at once by default, if some of them are sharded and some not."""
    name = "_get_foreach_kernels_supported_devices"
    places = ("torch.utils._foreach_utils", "torch.optim.optimizer") if is_mixed else ()
    with contextlib.ExitStack() as patches:
        # Pictures of the curves, which say nothing here, take long to draw.
        patches.enter_context(mock.patch("callbacks.outcome_log.write_curves"))
        for place in places:
            patches.enter_context(mock.patch(f"{place}.{name}", return_value=["cuda", "cpu"]))
        yield


def make(run: Run, root: Path) -> dict[str, Any]:
    """Fit a module and return what this rank has seen."""
    torch.manual_seed(7 + int(os.environ.get("LOCAL_RANK", "0")) * (run.strategy == "sharded"))
    strategy = {
        "ddp": partial(DDPStrategy, process_group_backend="gloo"),
        "sharded": partial(ShardedStrategy, process_group_backend="gloo"),
        "one": lambda: "auto",
    }[run.strategy]()
    is_reward, is_half = run.module.startswith("reward"), "bfloat16" in run.module
    kind = {"preference": "preference", "scenes": "scenes"}.get(run.module, "image")
    micro = run.micro_batches
    files = CountedFiles()
    # Of runs that start anew: others would measure the same again.
    is_measured = kind == "image" and run.start is None and not run.is_cut
    measured = evaluation(root / "captions") if is_measured else []
    watch = Watch(is_drawing=is_measured)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1 if run.strategy == "one" else 2,
        strategy=strategy,
        plugins=[files] if is_half else [files, DoublePrecision()],
        max_steps=run.steps,
        accumulate_grad_batches=micro,
        gradient_clip_val=None if is_reward else MAX_NORM,
        limit_val_batches=1,
        val_check_interval=2 * micro,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=False,
        inference_mode=run.strategy != "sharded",
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[EMA(), *measured, RunCheckpoint(every_n_steps=1, keep=9), watch],
        default_root_dir=root / run.folder,
    )
    module = (MODULES | BY_RANK)[run.module]()
    if not is_half:
        widen(module)
    with as_on_cuda(is_mixed=kind != "image"):
        trainer.fit(module, Steps(kind, micro), ckpt_path=run.start)
    names = ("losses", "images", "is_sharded", "trained", "values")
    return {"num_saved": files.num_saved} | {name: getattr(watch, name) for name in names}


def stored(root: Path, run: Run, step: int) -> Path:
    """Name a checkpoint that a run has written."""
    return checkpoint_path(root / run.folder, step)


def make_all(runs: list[Run], world: int, root: Path) -> list[list[dict[str, Any]]]:
    """Make runs one after the other, all in the same processes; return the findings by rank."""
    OwnBase().load(), ClipSource().load()  # once, before processes part
    pack_captions(root)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(
        _of_one_rank, (runs, world, root, port), nprocs=world, start_method="fork"
    )
    return [torch.load(root / f"rank {rank}.pt", weights_only=True) for rank in range(world)]


def pack_captions(root):
    """Make the shards of the evaluation, unless they are there."""
    if not (root / "captions").exists():
        made = ScenesShards(world="2x2", num_train=1, num_val=8, root=str(root / "scenes"))
        made.prepare()
        (root / "captions").symlink_to(made.folder("val"))


def _of_one_rank(rank, runs, world, root, port):
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {
            "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    found = [make(run, root) for run in runs]
    torch.save(found, root / f"rank {rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()
