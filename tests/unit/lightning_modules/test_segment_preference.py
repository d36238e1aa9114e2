"""Training of preference models: batches of both kinds, what is trained, and bad input."""

import copy
import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from toy_scorer import ANIMALS, ToyBatches, toy_batches

from lightning_modules.segment_preference import SegmentPreferenceModule
from segalign.errors import ConfigError, DataError
from segalign.losses.contrastive import OwnedFeatures, contrastive_losses, text_keys
from segalign.losses.objective import PreferenceObjective
from segalign.losses.pairwise import pairwise_loss, segment_pairwise_loss
from segalign.rewards.scorer_source import PretrainedScorer
from segalign.rewards.trained_parts import TrainedParts
from segalign.trainable import trainable_parameters

CONTRAST = PreferenceObjective(segment_contrastive=1)
BOTH = PreferenceObjective(pairwise=1, segment_contrastive=1)
ALL = PreferenceObjective(
    pairwise=1, segment_pairwise=1, margin=1, segment_margin=1, contrastive=1, segment_contrastive=1
)


def build(objective=BOTH, lr=0.1, **settings):
    torch.manual_seed(0)
    scorer = PretrainedScorer(model="tiny", init="random")
    make_optimizer = partial(torch.optim.SGD, lr=lr)
    module = SegmentPreferenceModule(make_optimizer, scorer=scorer, objective=objective, **settings)
    module.configure_model()
    module.logged = {}
    module.log = lambda name, value, **_: module.logged.update({name: float(value)})
    return module


def batch_of(kind, count=4, valid=4):
    (batch,) = toy_batches(valid, count, kind)
    for row in range(valid, count):
        batch["captions"][row] = ""
    return batch


def gradients(module, batch):
    loss = module.training_step(batch, 0)
    named = trainable_parameters(module)
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.item(), {
        name: torch.zeros_like(named[name]) if grad is None else grad
        for name, grad in zip(named, grads, strict=True)
    }


def segments_of(module, batch):
    split = [module.scorer.split(caption) for caption in batch["captions"]]
    owner = [row for row, texts in enumerate(split) for _ in texts]
    return [text for texts in split for text in texts], torch.tensor(owner)


@pytest.mark.parametrize(("text", "num_texts"), [("segments", 14), ("whole", 4)])
def test_a_batch_of_images_is_contrasted_with_its_captions(text, num_texts):
    module, batch = build(CONTRAST, text=text), batch_of("image")
    texts, owner = segments_of(module, batch)
    assert len(texts) == num_texts
    losses = contrastive_losses(
        OwnedFeatures(module.scorer.text_features(texts), owner),
        text_keys(texts),
        OwnedFeatures(module.scorer.image_features(batch["images"]), torch.arange(4)),
        torch.ones(4),
        batch["valid"],
        module.logit_scale,
    )
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss, losses.mean())
    assert loss.requires_grad
    expected = {"train/segment_contrastive_loss", "train/loss", "train/inverse_temperature"}
    assert module.logged.keys() == expected


def test_a_batch_of_pairs_is_compared_by_captions_and_by_segments():
    module = build(PreferenceObjective(pairwise=1, segment_pairwise=2))
    batch = batch_of("preference")
    probs = batch["preference_probs"]
    texts, owner = segments_of(module, batch)
    pairs = module.scorer.image_features(batch["image_pairs"].flatten(0, 1)).unflatten(0, (4, 2))
    by_segment = torch.einsum("ne,npe->np", module.scorer.text_features(texts), pairs[owner])
    by_caption = torch.stack([by_segment[owner == row].mean(dim=0) for row in range(4)])
    scale = module.logit_scale.exp()
    expected = pairwise_loss(scale * by_caption, probs)
    expected = expected + 2 * segment_pairwise_loss(scale * by_segment, owner, probs)
    torch.testing.assert_close(module.training_step(batch, 0), expected.mean())
    # One of the four is a tie.
    right = (by_caption[:, 0] > by_caption[:, 1]) == (probs[:, 0] > 0.5)
    assert module.logged["train/pair_accuracy"] == pytest.approx(right[[0, 1, 3]].float().mean())


@pytest.mark.parametrize("kind", ["image", "preference"])
def test_padded_rows_neither_cost_nor_count(kind):
    objective = ALL if kind == "preference" else CONTRAST
    full, padded = (build(objective, weigh_captions=True) for _ in range(2))
    loss, grads = gradients(full, batch_of(kind, 3, 3))
    other, others = gradients(padded, batch_of(kind, 5, 3))
    # The sum is divided by all rows; the optimizer step corrects that.
    assert other * 5 / 3 == pytest.approx(loss, rel=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(others[name] * 5 / 3, grad, rtol=1e-3, atol=1e-5)


def test_chunks_change_no_gradient():
    batch = batch_of("preference")
    batch["image_pairs"], batch["preference_probs"] = (
        batch[name].double() for name in ("image_pairs", "preference_probs")
    )
    whole, chunked = build(ALL).double(), build(ALL, chunk_size=3).double()
    loss, grads = gradients(whole, batch)
    other, others = gradients(chunked, batch)
    assert abs(other - loss) <= 1e-12
    for name, grad in grads.items():
        assert (others[name] - grad).abs().max() <= 1e-10, name
    assert any(grad.any() for grad in grads.values())


def test_frozen_parts_get_no_gradient():
    module = build(trained=TrainedParts(image_blocks=1, text_blocks=0))
    module.training_step(batch_of("preference"), 0).backward()
    model = module.scorer.model
    assert all(weight.grad is None for weight in model.text_model.parameters())
    assert model.text_projection.weight.grad is None
    first, last = model.vision_model.encoder.layers
    assert all(weight.grad is None for weight in first.parameters())
    assert last.mlp.fc1.weight.grad.any()
    assert module.scorer.model.logit_scale.grad.any()


def test_losses_leave_autocast():
    """Features are rounded by the towers, but sums and exponentials of them are not."""
    module, batch = build(), batch_of("preference")
    with torch.autocast("cpu", torch.bfloat16):
        features = module.encode(batch)
        loss = module.training_step(batch, 0)
    for values in (features.images, features.mean, features.segments.features, loss):
        assert values.dtype == torch.float32
    exact = module.objective.losses(features, module.logit_scale)
    assert loss.item() == pytest.approx(module.objective.total(exact).mean().item(), rel=1e-6)


def test_the_temperature_is_one_number_bounded_from_above():
    module = build(init_logit_scale=20.0, max_logit_scale=50.0)
    assert module.logit_scale.shape == module.scorer.model.logit_scale.shape == (1,)
    assert module.logit_scale.exp().item() == pytest.approx(20)
    with torch.no_grad():
        module.scorer.model.logit_scale.fill_(math.log(80))
    assert module.logit_scale.exp().item() == pytest.approx(50)
    module.on_train_batch_start(batch_of("image"), 0)
    assert module.scorer.model.logit_scale.exp().item() == pytest.approx(50)
    assert build().logit_scale.item() == pytest.approx(2.6592)  # that of a new CLIP model


def fit(module, batches, tmp_path):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=len(batches),
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, ToyBatches(batches))


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_a_temperature_beyond_its_bound_comes_back(tmp_path):
    """It starts at the bound, as CLIP's own does, and what it sees asks for less."""
    batch = batch_of("preference")
    batch["preference_probs"] = torch.tensor([[0.5, 0.5]] * 4)
    module = build(PreferenceObjective(pairwise=1), init_logit_scale=150.0, max_logit_scale=100.0)
    fit(module, [batch] * 2, tmp_path)
    assert module.scorer.model.logit_scale.item() < math.log(100) - 1e-4


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("part", ["text_projection", "visual_projection"])
def test_weights_that_are_not_finite_are_one_line(part, tmp_path):
    module = build()
    with torch.no_grad():
        getattr(module.scorer.model, part).weight[0, 0] = math.nan
    message = (
        rf"^expected finite weights of the scorer before training; `{part}.weight` holds NaN or "
        r"infinity; check what `scorer` names$"
    )
    with pytest.raises(DataError, match=message):
        fit(module, [batch_of("preference")], tmp_path)


def test_ties_of_equal_images_cost_nothing_and_others_stay_finite():
    module = build(PreferenceObjective(pairwise=1, segment_pairwise=1, margin=1))
    batch = batch_of("preference")
    batch["preference_probs"] = torch.full((4, 2), 0.5)
    loss, grads = gradients(module, batch)
    assert loss > 0
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    batch["image_pairs"][:, 1] = batch["image_pairs"][:, 0]
    loss, grads = gradients(module, batch)
    assert abs(loss) < 1e-6
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert module.logged["train/pair_accuracy"] == 0  # none was asked for


@pytest.mark.parametrize("name", ["num_pairs", "num_example_per_prompt"])
def test_captions_with_many_pairs_can_weigh_less(name):
    batch = batch_of("preference", 2, 2)
    objective = PreferenceObjective(pairwise=1)
    single = [gradients(build(objective), {k: v[row : row + 1] for k, v in batch.items()})[0]
              for row in range(2)]  # fmt: skip
    batch["metadata"] = [{name: 3}, {name: 1}]
    plain, _ = gradients(build(objective), batch)
    weighed, _ = gradients(build(objective, weigh_captions=True), batch)
    assert plain == pytest.approx(sum(single) / 2, rel=1e-4)
    assert weighed == pytest.approx((0.5 * single[0] + 1.5 * single[1]) / 2, rel=1e-4)


def test_losses_on_pairs_need_pairs():
    with pytest.raises(ConfigError, match=r"^expected preference pairs .* got single images; set "):
        build().training_step(batch_of("image"), 0)


def test_hinges_leave_the_temperature_alone():
    module = build(PreferenceObjective(margin=1))
    assert "scorer.model.logit_scale" not in trainable_parameters(module)
    assert "scorer.model.logit_scale" in trainable_parameters(build())


def test_nothing_is_loaded_before_it_is_asked_for():
    module = SegmentPreferenceModule(
        partial(torch.optim.SGD, lr=1), scorer=PretrainedScorer(model="no/such-model")
    )
    assert not list(module.parameters())
    built = build()
    scorer = built.scorer
    built.configure_model()
    assert built.scorer is scorer


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_a_few_steps_learn_which_caption_is_whose(tmp_path):
    """Images of one colour each, named by an animal: contrast alone tells them apart."""
    batch = batch_of("preference")
    batch["captions"] = [f"It rains. The {animal} runs." for animal in ANIMALS[:4]]
    colours = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    batch["image_pairs"] = colours.view(4, 1, 3, 1, 1).expand(4, 2, 3, 16, 16).contiguous()
    module = build(CONTRAST)
    before = gradients(module, batch)[0]
    module.make_optimizer = partial(torch.optim.Adam, lr=3e-3)
    fit(module, [copy.deepcopy(batch)] * 20, tmp_path)
    assert gradients(module, batch)[0] < before / 4


def test_it_scores_but_predicts_nothing():
    module = build()
    batch = batch_of("image")
    with torch.no_grad():
        scores = module(batch["images"], batch["captions"])
        segments = module.scorer.segment_features(batch["captions"]).split()
        each = module.scorer.image_features(batch["images"])
        expected = [(part @ image).mean() for part, image in zip(segments, each, strict=True)]
    torch.testing.assert_close(scores, torch.stack(expected))
    with pytest.raises(ConfigError, match=r"^expected a model that makes images for `predict`; "):
        module.predict_step(batch, 0)
