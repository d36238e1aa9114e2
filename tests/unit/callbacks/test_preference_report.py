"""The report of a preference model, through the real trainer."""

import copy
import csv
import logging

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from toy_scorer import WIDTH, ToyBatches, ToyScorerModule, toy_batches, toy_caption, toy_scorer

from callbacks.preference_report import PreferenceReport
from segalign.errors import ConfigError, DataError
from segalign.metrics.ranking import gallery_ranks, to_fixed_point
from segalign.rewards.common_direction import CorpusDirection, Provenance
from segalign.rewards.direction_checks import describe_text, text_digest


def make_trainer(folder, *callbacks, **settings):
    return pl.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, callbacks=list(callbacks),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, **settings,
    )  # fmt: skip


def records(path):
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def module():
    return ToyScorerModule()


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR)


def test_test_writes_retrieval(tmp_path, module, capsys):
    callback = PreferenceReport(gallery_size=10, max_segments=(1, 2))
    trainer = make_trainer(tmp_path, callback)
    trainer.test(module, ToyBatches(toy_batches(22, 8)), verbose=False)
    text = (tmp_path / "retrieval.md").read_text()
    assert "2 galleries of 10 images" in text
    assert "(2 samples left out, 22 distinct captions in all)" in text
    assert "V is estimated from the ranked captions" in text
    assert "| text embedding | text to image, single | text to image, average |" in text
    assert "| text embedding | 1 | 2 | all |" in text
    assert "| chance |  | 0.1000 | 0.5000 | 1.0000 |" in text
    rows = records(tmp_path / "retrieval.csv")
    assert len(rows) == 2 * 4 * 2 * 3
    assert {row["reading"] for row in rows} == {"single", "first 1", "first 2", "average"}
    key = {"text_embedding": "C", "reading": "average", "direction": "text_to_image", "k": "5"}
    (row,) = [row for row in rows if key.items() <= row.items()]
    assert float(row["recall"]) == pytest.approx(by_hand(module, 5))
    assert trainer.logged_metrics["test/r_at_5"].item() == pytest.approx(by_hand(module, 5))
    with Image.open(tmp_path / "retrieval.png") as picture:
        assert picture.width > picture.height > 300
    printed = capsys.readouterr().out
    assert "R@1 by text embedding" in printed
    assert "retrieval.png" in printed
    assert not (tmp_path / "pair_accuracy.md").exists()


def by_hand(module, cutoff):
    images = torch.cat([batch["images"] for batch in toy_batches(20, 10)])
    captions = [toy_caption(number) for number in range(20)]
    module.eval()
    with torch.no_grad():
        features = to_fixed_point(module.scorer.image_features(images))
        texts = to_fixed_point(module.scorer.segment_features(captions).mean())
    halves = [slice(0, 10), slice(10, 20)]
    ranks = [gallery_ranks(features[one], texts[one], torch.arange(10))[0] for one in halves]
    return (torch.cat(ranks) < cutoff).float().mean().item()


def test_test_writes_pair_accuracy(tmp_path, module, capsys):
    trainer = make_trainer(tmp_path, PreferenceReport(retrieval_on_preferred=True))
    trainer.test(module, ToyBatches(toy_batches(22, 8, "preference")), verbose=False)
    text = (tmp_path / "pair_accuracy.md").read_text()
    assert "Accuracy on 17 preference pairs (5 ties left out)" in text
    rows = records(tmp_path / "pair_accuracy.csv")
    counts = {row["bucket"]: row["count"] for row in rows if row["reading"] == "average"}
    assert counts == dict.fromkeys(["all", "length/1-77", "within_77", "fact_in_segment/1"], "17")
    alone = {row["bucket"]: row["count"] for row in rows if "alone" in row["reading"]}
    # Captions have 2, 3, 4 and 5 segments in turn; every third of them is a tie.
    assert alone == {"segment/1": "17", "segment/2-3": "28", "segment/4-7": "10"}
    (whole,) = [row for row in rows if (row["reading"], row["bucket"]) == ("single", "all")]
    assert float(whole["accuracy"]) == pytest.approx(pairs_by_hand(module))
    assert "17 images" in (tmp_path / "retrieval.md").read_text()
    assert (tmp_path / "pair_accuracy.png").stat().st_size > 10_000
    assert "Pair accuracy" in capsys.readouterr().out


def pairs_by_hand(module):
    (batch,) = toy_batches(22, 22, "preference")
    module.eval()
    with torch.no_grad():
        texts = module.scorer.text_features(batch["captions"])
        scores = [(module.scorer.image_features(images) * texts).sum(-1)
                  for images in batch["image_pairs"].unbind(1)]  # fmt: skip
    return wins(torch.stack(scores, dim=1), batch)


def wins(scores, batch):
    probs = batch["preference_probs"]
    margins = ((scores[:, 0] - scores[:, 1]) * (probs[:, 0] - probs[:, 1]))[probs[:, 0] != 0.5]
    return (margins > 0).float().mean().item()


def save_direction(path, direction, scorer):
    facts = Provenance(
        model="toy",
        model_digest=text_digest(scorer),
        text=describe_text(scorer.segmenter),
        captions_digest="1",
        num_captions=512,
    )
    CorpusDirection(direction, facts).save(path)


def test_a_given_direction_serves_pairs_too(tmp_path, module, capsys):
    (batch,) = toy_batches(22, 22, "preference")
    with torch.no_grad():
        module.eval()
        texts = module.scorer.segment_features(batch["captions"]).mean()
        images = module.scorer.image_features(batch["image_pairs"].flatten(0, 1)).view(22, 2, -1)
    direction = torch.nn.functional.normalize(texts.mean(0), dim=0)
    save_direction(tmp_path / "v.safetensors", direction, module.scorer)
    trainer = make_trainer(tmp_path, PreferenceReport(common_direction=f"{tmp_path}/v.safetensors"))
    trainer.test(module, ToyBatches([batch]), verbose=False)
    found = trainer.logged_metrics["test/pair_accuracy_average_text_relevant"].item()
    relevant = texts - (texts @ direction)[:, None] * direction
    expected = wins((images * relevant[:, None]).sum(-1), batch)
    assert found == pytest.approx(expected)
    assert found != trainer.logged_metrics["test/pair_accuracy_average"].item()
    assert "C⊥, average" in (tmp_path / "pair_accuracy.md").read_text()


def test_the_direction_of_another_model_is_refused(tmp_path, module):
    path = tmp_path / "v.safetensors"
    unit = torch.eye(WIDTH)[0]
    save_direction(path, unit[:-1], module.scorer)
    refused(tmp_path, module, [], "common direction of width 12", common_direction=str(path))
    other = copy.deepcopy(module.scorer)
    with torch.no_grad():
        other.model.text_projection.weight += 1
    save_direction(path, unit, other)
    refused(tmp_path, module, [], "this model's text weights", common_direction=str(path))


@pytest.mark.parametrize(("kind", "name"), [("image", "r_at_1"), ("preference", "pair_accuracy")])
def test_validation_logs(tmp_path, module, kind, name):
    trainer = make_trainer(tmp_path, PreferenceReport())
    trainer.validate(module, ToyBatches(toy_batches(12, 8, kind)), verbose=False)
    assert 0 <= trainer.logged_metrics[f"val/{name}"] <= 1
    assert f"val/{name}_single" in trainer.logged_metrics
    assert list(tmp_path.iterdir()) == []


def fit(folder, *callbacks):
    torch.manual_seed(3)
    module = ToyScorerModule()
    module.scorer.model.text_model.eval().requires_grad_(False)
    data = ToyBatches(toy_batches(8, 4))
    trainer = make_trainer(folder, *callbacks, max_epochs=2)
    torch.manual_seed(4)
    trainer.fit(module, data)
    return module


def test_training_does_not_notice(tmp_path):
    plain, watched = fit(tmp_path), fit(tmp_path, PreferenceReport())
    assert plain.draws == watched.draws
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, watched.state_dict()[name])
    assert not watched.scorer.model.text_model.training
    assert plain.state_dict().keys() == watched.state_dict().keys()


def test_each_part_returns_to_its_mode(tmp_path):
    module = ToyScorerModule()
    module.scorer.model.vision_model.eval()
    before = {name: part.training for name, part in module.named_modules()}
    callback = PreferenceReport()
    state = copy.deepcopy(module.state_dict())
    with_gradient = []
    encode = module.scorer.text_features
    module.scorer.text_features = lambda texts: (
        with_gradient.append(torch.is_grad_enabled()) or encode(texts)
    )
    callback.on_test_epoch_start(None, module)
    callback.on_test_batch_end(None, module, None, toy_batches(4, 4)[0], 0)
    assert {name: part.training for name, part in module.named_modules()} == before
    assert with_gradient == [False, False]
    assert all(torch.equal(state[name], module.state_dict()[name]) for name in state)
    assert not any("retrieval" in name for name in module.state_dict())


def test_a_scorer_without_segments_is_known_by_its_whole_captions(tmp_path, module):
    trainer = make_trainer(tmp_path, PreferenceReport())
    trainer.validate(module, ToyBatches(toy_batches(24, 12)), verbose=False)
    average = dict(trainer.logged_metrics)
    whole = copy.deepcopy(module)
    whole.scorer = toy_scorer()
    trainer.validate(whole, ToyBatches(toy_batches(24, 12)), verbose=False)
    for name in ("val/r_at_1_single", "val/r_at_1_average"):
        assert trainer.logged_metrics[name] == average[name]
    assert average["val/r_at_1_average"] == average["val/r_at_1"] != average["val/r_at_1_single"]
    assert trainer.logged_metrics["val/r_at_1"] == average["val/r_at_1_single"]


def refused(tmp_path, module, batches, match, kind=DataError, **settings):
    trainer = make_trainer(tmp_path, PreferenceReport(**settings))
    with pytest.raises(kind, match=match) as caught:
        trainer.test(module, ToyBatches(batches or toy_batches(4, 4)), verbose=False)
    assert "\n" not in str(caught.value)


def test_captions_alone_are_refused(tmp_path, module):
    refused(tmp_path, module, toy_batches(8, 4, "caption"), "got captions alone")


def test_a_gallery_larger_than_the_data_is_refused(tmp_path, module):
    refused(tmp_path, module, toy_batches(8, 4), "at least 9 .* got 8", gallery_size=9)


def test_nan_is_refused(tmp_path, module):
    broken = copy.deepcopy(module)
    with torch.no_grad():
        broken.scorer.model.text_projection.weight[0, 0] = torch.nan
    refused(tmp_path, broken, toy_batches(8, 4), "finite features")
    refused(tmp_path, broken, toy_batches(8, 4, "preference"), "finite scores")


def test_a_module_without_scorer_is_refused(tmp_path):
    class Other(ToyScorerModule):
        def __init__(self):
            super().__init__()
            del self.scorer

    refused(tmp_path, Other(), toy_batches(8, 4), "`Other` has none", kind=ConfigError)
