"""Two ranks contrast, and weigh pairs, as one does with their joined batch; so does training."""

import copy
import math
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed, multiprocessing, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from toy_scorer import toy_batches

from lightning_modules.segment_preference import SegmentPreferenceModule
from segalign.losses.caption_weights import pair_weights
from segalign.losses.contrastive import OwnedFeatures, contrastive_losses, text_keys
from segalign.losses.objective import PreferenceObjective
from segalign.rewards.scorer_source import PretrainedScorer

pytestmark = pytest.mark.distributed

WIDTH = 8
TOLERANCES = {torch.float64: 1e-10, torch.float32: 5e-5}
# Segments of each caption; "rain" falls on both ranks, as does a whole caption.
WORDS = [["a fox", "rain", "fog"], ["an owl"], ["rain", "a hen"], ["a fox", "rain", "fog"],
         ["a hut", "mist", "an elk", "snow"], ["a bee"]]  # fmt: skip
VALID = [True, True, True, True, False, True]
NUM_PAIRS = [None, 3, None, None, None, 2]
# Captions of each rank, and so segments, are uneven.
SHARES = [range(2), range(2, 6)]
PROBS = [(1.0, 0.0), (0.3, 0.7), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.6, 0.4)]


def inputs(dtype):
    """Inputs of a shared encoder: of all texts, and of both images of each caption."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(sum(map(len, WORDS)), WIDTH, generator=generator, dtype=torch.float64)
    images = torch.randn(len(WORDS), 2, WIDTH, generator=generator, dtype=torch.float64)
    return texts.to(dtype), images.to(dtype)


def encoder(dtype):
    torch.manual_seed(1)
    return nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)


def contrast(rows, dtype) -> dict[str, torch.Tensor]:
    """Losses of some captions, and the gradients of their sum."""
    words = [WORDS[row] for row in rows]
    of_all = [row for row, group in enumerate(WORDS) for _ in group]
    texts, images = inputs(dtype)
    texts = texts[torch.tensor([row in rows for row in of_all])]
    model, scale = encoder(dtype), torch.tensor([math.log(9.0)], dtype=dtype, requires_grad=True)
    text_features = F.normalize(model(texts), dim=-1)
    image_features = F.normalize(model(images[list(rows)]).flatten(0, 1), dim=-1)
    owner = torch.tensor([own for own, group in enumerate(words) for _ in group])
    losses = contrastive_losses(
        OwnedFeatures(text_features, owner),
        text_keys([word for group in words for word in group]),
        OwnedFeatures(image_features, torch.arange(len(words)).repeat_interleave(2)),
        torch.tensor([PROBS[row] for row in rows], dtype=dtype).flatten(),
        torch.tensor([VALID[row] for row in rows]),
        scale,
    )
    leaves = (text_features, image_features, model.weight, scale)
    grads = torch.autograd.grad(losses.sum(), leaves)
    names = ("texts", "images", "encoder", "scale")
    return {"losses": losses.detach(), **dict(zip(names, grads, strict=True))}


def weigh(rows) -> torch.Tensor:
    captions = [" ".join(WORDS[row]) for row in rows]
    valid = torch.tensor([VALID[row] for row in rows])
    return pair_weights(captions, [NUM_PAIRS[row] for row in rows], valid)


def join(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )


def of_one_rank(rank: int, folder: str) -> None:
    join(rank, folder)
    found = {"weights": weigh(SHARES[rank])}
    for dtype in TOLERANCES:
        values = contrast(SHARES[rank], dtype)
        found |= {f"{name} {dtype}": value for name, value in values.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_contrast_and_weigh_as_one(tmp_path: Path):
    multiprocessing.start_processes(of_one_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    everyone = range(len(WORDS))
    weights = weigh(everyone)
    assert torch.cat([rank["weights"] for rank in ranks]).tolist() == weights.tolist()
    assert 2 * weights[0] == 2 * weights[3] == weights[2]  # a caption of two ranks
    for dtype, tolerance in TOLERANCES.items():
        expected = contrast(everyone, dtype)
        assert expected["losses"].count_nonzero() == sum(VALID)
        for name, wanted in expected.items():
            parts = [rank[f"{name} {dtype}"] for rank in ranks]
            # What is shared gets its gradient from both ranks, as averaging over ranks gives it.
            found = sum(parts) if name in ("encoder", "scale") else torch.cat(parts)
            assert (found - wanted).abs().max() <= tolerance, name
            assert wanted.abs().max() > 0.1, name


class Shares(pl.LightningDataModule):
    """One global batch of pairs, the same every step, of which each rank sees its own rows."""

    def train_dataloader(self):
        (whole,) = toy_batches(7, 8, "preference")  # the last row is padding
        whole["captions"][6] = whole["captions"][0]  # of the two ranks
        size = 8 // self.trainer.world_size
        rows = slice(self.trainer.global_rank * size, (self.trainer.global_rank + 1) * size)
        return DataLoader([{name: value[rows] for name, value in whole.items()}] * 2, None)


class Keep(pl.Callback):
    """Write every rank's weights: processes end with their runs."""

    def on_train_start(self, trainer, pl_module):
        self.start = copy.deepcopy(pl_module.state_dict())

    def on_train_end(self, trainer, pl_module):
        assert trainer.global_step == 2
        weights = pl_module.state_dict()
        moved = {name: (weights[name] - old).abs().max() for name, old in self.start.items()}
        assert max(moved.values()) > 1e-3
        torch.save(weights, f"{trainer.default_root_dir}/{trainer.global_rank}.pt")


def train(devices: int, folder: Path, settings) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    module = SegmentPreferenceModule(
        partial(torch.optim.SGD, lr=0.05),
        scorer=PretrainedScorer(model="tiny", init="random"),
        **settings,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=DDPStrategy(start_method="fork") if devices > 1 else "auto",
        precision="64-true",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Keep()],
        default_root_dir=folder,
    )
    trainer.fit(module, Shares())
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(devices)]


OBJECTIVES = {
    "contrast": {
        "objective": PreferenceObjective(pairwise=1, segment_contrastive=1),
        "weigh_captions": True,
        "chunk_size": 3,
    },
    # No loss depends on the temperature, whose gradient ranks must not wait for.
    "margin": {"objective": PreferenceObjective(margin=1, margin_width=1)},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_ranks_train_as_one(objective, tmp_path: Path):
    (one,) = train(1, tmp_path, OBJECTIVES[objective])
    for two in train(2, tmp_path, OBJECTIVES[objective]):
        assert one.keys() == two.keys()
        for name, weight in one.items():
            assert weight.dtype == torch.float64
            assert (weight - two[name]).abs().max() <= 1e-10, name
