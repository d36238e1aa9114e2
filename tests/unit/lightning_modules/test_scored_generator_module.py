"""Validation by rewards: what is logged of which images, in which precision, by which crop."""

import copy
import logging
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from toy_tuning import Brightness, Captions, CaptionStream, ClipSource, Known, Recorder, TinyBase
from toy_tuning import scorer as toy_scorer

from callbacks.reward_report import RewardReport
from lightning_modules.reward_finetuning import RewardFineTuningModule
from lightning_modules.step_speed import StepSpeed
from segalign.diffusion.lora import LoraSettings
from segalign.diffusion.made_images import MADE_IMAGES
from segalign.diffusion.sampler import DDIMSampler
from segalign.errors import ConfigError
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.common_direction import EmaDirection
from segalign.text.settings import TextEncoding
from segalign.truncation.drtune import DRTune

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`"),
]


@pytest.fixture(autouse=True)
def _no_speed(monkeypatch):
    """Counting what a step costs takes longer than the steps."""
    silent = SimpleNamespace(start=lambda: None, stop=lambda _: None, figures=lambda *_: {})
    monkeypatch.setattr(StepSpeed, "of", lambda _: silent)


class Cropped:
    def load(self):
        own = toy_scorer()._replace(model=copy.deepcopy(toy_scorer().model).float())
        return ClipReward(own, crop=16)


def build(reward, kind=RewardFineTuningModule, lr=0.0, **settings):
    torch.manual_seed(0)
    return kind(
        reward=reward,
        base=TinyBase(),
        optimizer=partial(torch.optim.SGD, lr=lr),
        lora=LoraSettings(rank=2, target_modules=r".*\.(conv1|to_q|to_v)"),
        text=TextEncoding(token_budget=8),
        strategy=DRTune(num_train_steps=1),
        rollout_sampler=DDIMSampler(num_inference_steps=2),
        sampler=DDIMSampler(num_inference_steps=2, guidance_scale=2.0),
        **settings,
    )


def make_trainer(folder, max_steps=2, **settings):
    return pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        val_check_interval=1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=Recorder(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **settings,
    )


def test_the_last_training_step_does_not_decide_how_images_are_cropped(tmp_path):
    module, trainer = build(Cropped()), make_trainer(tmp_path, 3)
    trainer.fit(module, Captions())
    found = trainer.logger.of("val/reward_mean")
    assert len(found) == 3
    assert len({*found}) == 1
    assert module.reward.step == 2
    anew = make_trainer(tmp_path)
    (logged,) = anew.validate(build(Cropped()), Captions(), verbose=False)
    assert logged["val/reward_mean"] == found[0]


class Again(pl.Callback):
    """Makes and scores the images of a validation once more, from outside its step."""

    def __init__(self):
        self.found = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_args):
        ids = batch["sample_ids"].tolist()
        images = pl_module.generate(batch["captions"], ids, pl_module.eval_seed)
        assert torch.equal(images, outputs[MADE_IMAGES].images)
        scores = pl_module.score_images(images, batch["captions"], batch["valid"])
        self.found.append(scores["reward"][batch["valid"]].mean().item())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_callbacks_see_the_precision_of_validation(precision, tmp_path):
    again = Again()
    trainer = make_trainer(tmp_path, 1, precision=precision, callbacks=[again])
    module = build(ClipSource())
    trainer.fit(module, Captions())
    assert again.found == trainer.logger.of("val/reward_mean")
    plain = build(ClipSource())
    plain.configure_model()
    batch = CaptionStream(50, (True, True, False), False).batch(50)
    made = [one.generate(batch["captions"], [1, 2, 3], 0) for one in (module, plain)]
    assert torch.equal(*made) == (precision == "32-true")


class Overflowing(RewardFineTuningModule):
    """The second image of every batch, and the padding, are not finite."""

    def generate(self, captions, sample_ids, eval_seed, weights="raw"):
        images = super().generate(captions, sample_ids, eval_seed, weights)
        images[1:, 0, 0] = torch.nan
        return images


class Wrecked(RewardFineTuningModule):
    def generate(self, *arguments, **settings):
        return super().generate(*arguments, **settings) * torch.nan


def validate(kind, folder, caplog):
    module, trainer = (
        build(Known(Brightness()), kind, held_out={"c": ClipSource()}),
        make_trainer(folder),
    )
    with caplog.at_level(logging.WARNING):
        (logged,) = trainer.validate(module, Captions(), verbose=False)
    warned = [one.getMessage() for one in caplog.records if "not finite" in one.getMessage()]
    return module, logged, warned


def test_an_image_that_is_not_finite_does_not_end_a_run(tmp_path, caplog):
    module, logged, (warned,) = validate(Overflowing, tmp_path, caplog)
    assert warned.startswith("1 images of the validation at step 0 are not finite; ")
    assert logged["val/non_finite_images"] == 1
    batch = CaptionStream(50, (True, True, False), False).batch(50)
    images = module.generate(batch["captions"], batch["sample_ids"].tolist(), module.eval_seed)
    assert logged["val/reward_mean"] == pytest.approx(images[0].mean().item(), rel=1e-6)
    assert torch.tensor(list(logged.values())).isfinite().all()


def test_images_none_of_which_is_finite_have_no_mean(tmp_path, caplog):
    _, logged, warned = validate(Wrecked, tmp_path, caplog)
    assert len(warned) == 1
    assert logged.pop("val/non_finite_images") == 2
    assert logged
    assert torch.tensor(list(logged.values())).isnan().all()


def test_all_being_well_nothing_is_said(tmp_path, caplog):
    _, logged, warned = validate(RewardFineTuningModule, tmp_path, caplog)
    assert warned == []
    assert logged["val/non_finite_images"] == 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_weights_that_stand_still_are_worth_the_same_before_and_after(precision, tmp_path):
    """The common direction moves on: it has no mean before training, and one of batches after."""
    report = RewardReport(num_captions=2, num_pictures=2, batch_size=2)
    module = build(ClipSource(partial(EmaDirection, 0.5)), held_out={"bright": Known(Brightness())})
    trainer = make_trainer(tmp_path, 3, precision=precision, callbacks=[report])
    trainer.fit(module, Captions())
    assert len(module.reward.common_direction.mean)
    before, after = report.figures["before"], report.figures["after"]
    assert before.values == after.values
    assert {"reward", "reward/text_relevant", "held_out/bright"} < set(before.values)
    assert torch.equal(before.pictures, after.pictures)
    files = sorted(path.name for path in (tmp_path / "report" / "before").iterdir())
    assert files == ["00000.png", "00001.png"]


@pytest.mark.parametrize("name", ["a.b", "a/b", "", "items", "type", "rewards"])
def test_names_that_cannot_be_are_refused_before_anything_is_read(name):
    with pytest.raises(ConfigError, match=rf"^[^\n]* a reward in `held_out`; got `{name}`; rename"):
        build(Known(Brightness()), held_out={name: ClipSource()})
