"""The callbacks bring the metrics that their settings name; tests write their results."""

import json

import lightning.pytorch as pl
import pytest
import torch
from tiny_run import model_settings
from torch import Tensor

from callbacks.alignment import SceneFacts, TextAlignment
from callbacks.evaluation_report import EvaluationReport
from callbacks.fid import FID
from callbacks.image_evaluation import ImageEvaluation
from callbacks.inception_score import InceptionScore
from callbacks.kid import CMMD, KID
from callbacks.lpips import LPIPS
from datamodules.long_caption import LongCaptionDataModule
from lightning_modules.run_loading import build_module
from segalign.data.scene_shards import ScenesShards
from segalign.errors import ConfigError, DataError, NonFiniteError
from segalign.metrics.extractors.inception import InceptionV3
from segalign.metrics.extractors.tiny import TinyExtractor
from segalign.metrics.perceptual.tiny import TinyPerceptual

SMALL = {"num_features": 4, "num_classes": 3}


class Brightness:
    """A reward: how bright an image is."""

    def load(self):
        return lambda images, captions: images.mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    made = ScenesShards(
        world="2x2", num_train=4, num_val=8, root=str(tmp_path_factory.mktemp("scenes"))
    )
    made.prepare()
    return made


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    made = build_module(model_settings(text={"token_budget": 160}))
    made.configure_model()
    return made


def run_test(run_dir, shards, module, *callbacks, num_captions=6, images_per_caption=2):
    evaluation = ImageEvaluation(num_captions, images_per_caption, batch_size=4)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=run_dir,
        callbacks=[evaluation, *callbacks],
    )
    run_dir.mkdir(exist_ok=True)
    data = LongCaptionDataModule(scenes=shards, content="caption", global_batch_size=4)
    trainer.test(module, data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_all_metrics_are_found_in_one_pass(run_dir, shards, module, capsys):
    calls = []
    extractor = TinyExtractor(**SMALL)
    load = extractor.load

    def loaded_once():
        calls.append(1)
        return load()

    extractor.load = loaded_once
    values = run_test(
        run_dir, shards, module,
        FID(extractor, name="fid_tiny"), KID(extractor, name="kid_tiny"),
        CMMD(extractor, name="cmmd_tiny"), InceptionScore(extractor, num_splits=2),
        LPIPS(TinyPerceptual(), name="distance"), SceneFacts("2x2"),
        TextAlignment({"brightness": Brightness()}), EvaluationReport(num_pictures=2, name="toy"),
    )  # fmt: skip
    expected = [
        "fid_tiny", "kid_tiny", "cmmd_tiny", "inception_score", "inception_score_std",
        "distance_diversity", "attributes", "reward/brightness", "non_finite_images",
    ]  # fmt: skip
    assert {f"test/{name}" for name in expected} <= values.keys()
    assert all(torch.tensor(list(values.values())).isfinite())
    assert not any("/length/" in name for name in values)
    assert len(calls) == 1

    folder = run_dir / "evaluation" / "test"
    result = json.loads((folder / "result.json").read_text())
    stored = {n: v for one in result["metrics"].values() for n, v in one["values"].items()}
    assert stored["fid_tiny"] == pytest.approx(values["test/fid_tiny"], rel=1e-6)
    assert stored["reward/brightness/length/1-77"] > 0
    assert result["metrics"]["fid_tiny"]["protocol"]["num_real"] == 8
    assert result["metrics"]["fid_tiny"]["protocol"]["num_generated"] == 12
    assert "<html" in (folder / "result.html").read_text()
    printed = capsys.readouterr().out
    assert "toy" in printed
    assert "result.html" in printed


def test_reference_images_can_be_others(run_dir, shards, module):
    values = run_test(run_dir, shards, module, KID(TinyExtractor(**SMALL), num_reference=3))
    fewer = run_test(run_dir, shards, module, KID(TinyExtractor(**SMALL)))
    assert values["test/kid"] != fewer["test/kid"]


def test_there_must_be_real_images(run_dir):
    trainer = pl.Trainer(default_root_dir=run_dir, logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigError, match=r"neither `reference` nor `data.val_shards`"):
        FID(TinyExtractor()).make_metrics(trainer, pl.LightningModule())


def test_too_few_images_for_a_distance_are_refused_before_any_is_made(run_dir, shards, module):
    with pytest.raises(ConfigError, match=r"allow_few_images: true"):
        run_test(run_dir, shards, module, FID(TinyExtractor(num_features=64)))


def test_missing_weights_say_where_to_get_them(run_dir, shards, module, tmp_path):
    source = InceptionV3(weights=str(tmp_path / "absent.pth"))
    with pytest.raises((ConfigError, DataError), match=r"absent\.pth"):
        run_test(run_dir, shards, module, FID(source, allow_few_images=True))


def test_diversity_needs_two_images(run_dir, shards, module):
    values = run_test(
        run_dir, shards, module, LPIPS(TinyPerceptual(), name="d"), images_per_caption=1
    )
    assert "test/d_diversity" not in values


def test_retrieval_must_name_a_reward():
    with pytest.raises(
        ConfigError, match=r"`retrieval` to name one of the rewards \(`a`\); got `b`"
    ):
        TextAlignment({"a": Brightness()}, retrieval="b")


class Stubborn(pl.LightningModule):
    """Makes grey images, but not of every caption."""

    best_weights = "raw"

    def __init__(self, refuses=(), value: float = 0.5):
        super().__init__()
        self.refuses, self.value = refuses, value

    def generate(self, captions, sample_ids, eval_seed, weights="raw") -> Tensor:
        if any(one in sample_ids for one in self.refuses):
            raise RuntimeError("this caption breaks it")
        return torch.full((len(captions), 3, 8, 8), self.value)

    def test_step(self, batch, batch_idx):
        pass


def test_a_caption_that_fails_is_recorded_and_ends_the_command(run_dir, shards):
    with pytest.raises(DataError, match=r"2 of 12 could not be made.* this caption breaks it"):
        run_test(run_dir, shards, Stubborn(refuses=[3]), EvaluationReport(num_pictures=0))
    result = json.loads((run_dir / "evaluation" / "test" / "result.json").read_text())
    assert [one["place"] for one in result["failures"]] == [6, 7]
    assert result["num_counted"] == 10


def test_images_that_are_all_nan_end_the_command(run_dir, shards):
    with pytest.raises(NonFiniteError, match="all 12 are NaN"):
        run_test(run_dir, shards, Stubborn(value=float("nan")), EvaluationReport(num_pictures=0))
    result = json.loads((run_dir / "evaluation" / "test" / "result.json").read_text())
    assert (result["num_counted"], result["num_non_finite"]) == (0, 12)


def test_images_outside_their_range_end_the_command(run_dir, shards):
    with pytest.raises(DataError, match=r"expected images in \[0, 1\] from the model; got 2"):
        run_test(run_dir, shards, Stubborn(value=2.0), EvaluationReport(num_pictures=0))
    result = json.loads((run_dir / "evaluation" / "test" / "result.json").read_text())
    assert len(result["failures"]) == 12
