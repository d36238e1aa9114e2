"""Reward fine-tuning through a trainer: what moves, what is logged and saved, what is refused."""

import math
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from toy_tuning import (
    Brightness,
    Captions,
    CaptionStream,
    ClipSource,
    Known,
    Recorder,
    TinyBase,
    ToyCodec,
)

from callbacks.checkpoint import RunCheckpoint, SafetensorsCheckpointIO
from callbacks.ema import EMA
from lightning_modules.reward_checks import check_trainer
from lightning_modules.reward_finetuning import RewardFineTuningModule
from lightning_modules.run_loading import build_module, load_module
from lightning_modules.sharded_strategy import ShardedStrategy
from segalign.diffusion.clipped_sampler import ClippedSampler
from segalign.diffusion.lora import LoraSettings
from segalign.diffusion.sampler import DDIMSampler
from segalign.diffusion.step_cost import StepCost
from segalign.errors import ConfigError, DataError
from segalign.reward_tuning.denoising import denoising_gradient
from segalign.reward_tuning.settings import PenaltySettings, StepMemory
from segalign.rewards.bound_reward import RewardTerms
from segalign.rewards.common_direction import EmaDirection
from segalign.rewards.mixture import RewardMixture, WeightedReward
from segalign.run_format import read_tensors, save_checkpoint
from segalign.skipped_steps import SkippedStep
from segalign.text.settings import T5Branch, TextEncoding
from segalign.trainable import trainable_parameters, trainable_state_dict
from segalign.truncation.chain import Chain
from segalign.truncation.draft import DRaFT, DRaFTLV
from segalign.truncation.drtune import DRTune
from segalign.truncation.refl import ReFL

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`"),
]
STEPS = DDIMSampler(num_inference_steps=3, guidance_scale=2.0)
LORA = LoraSettings(rank=2, target_modules=r".*\.(conv1|to_q|to_v)")
CLIP = ClipSource(partial(EmaDirection, 0.5))


@pytest.fixture(scope="module")
def costs():
    return []


@pytest.fixture(autouse=True)
def _count_work_once(monkeypatch, costs):
    """What a step costs is counted for the first module alone: counting takes longer than steps."""
    measure = StepCost.measure

    def measure_once(*arguments, **settings):
        if not costs:
            costs.append(measure(*arguments, **settings))
        return costs[0]

    monkeypatch.setattr(StepCost, "measure", measure_once)


def build(reward=CLIP, lr=0.1, **settings):
    torch.manual_seed(0)
    defaults = {
        "base": TinyBase(),
        "optimizer": partial(torch.optim.SGD, lr=lr),
        "lora": LORA,
        "text": TextEncoding(token_budget=8),
        "strategy": DRTune(num_train_steps=2),
        "rollout_sampler": STEPS,
        "sampler": DDIMSampler(num_inference_steps=1, guidance_scale=2.0),
    }
    if not hasattr(reward, "load"):
        reward = Known(reward)
    return RewardFineTuningModule(reward=reward, **(defaults | settings))


def fit(module, tmp_path, max_steps=2, data=None, ckpt_path=None, **settings):
    """Train; return the trainer, whose logger has kept what was logged."""
    defaults = {
        "accelerator": "cpu",
        "max_steps": max_steps,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "logger": Recorder(),
        "enable_checkpointing": any(
            isinstance(one, RunCheckpoint) for one in settings.get("callbacks", [])
        ),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    trainer = pl.Trainer(**(defaults | settings))
    trainer.fit(module, data or Captions(), ckpt_path=ckpt_path)
    return trainer


def weights(module):
    return {name: weight.detach().clone() for name, weight in trainable_parameters(module).items()}


def assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def start(**settings):
    """The weights that a module starts from."""
    module = build(**settings)
    module.configure_model()
    return weights(module)


def redness(images, captions):
    red, _, blue = images.mean(dim=(2, 3)).unbind(1)
    return red - blue


@pytest.mark.parametrize("lora", [LoraSettings(rank=4), None])
def test_the_reward_rises(lora, tmp_path):
    module = build(redness, lora=lora, optimizer=partial(torch.optim.Adam, lr=0.03))
    rewards = fit(module, tmp_path, 12).logger.of("train/reward_mean")
    assert len(rewards) == 12
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.15
    before, after = start(lora=lora), weights(module)
    assert all(name.startswith("unet.") for name in after)
    assert any("lora_" in name for name in after) == (lora is not None)
    assert not any(torch.equal(after[name], before[name]) for name in after)


LOGGED = {
    "loss", "penalty", "reward_mean", "reward/text_relevant", "reward/text_irrelevant",
    "reward/common_share", "grad_norm", "offset", "factor_sum", "step_grad_norm/0",
    "step_grad_norm/1", "lora_norm", "images_per_second", "tflops_per_second", "dropped_tokens",
    "cut_segments",
}  # fmt: skip


def train_rows(trainer):
    """What was logged of training, by step."""
    rows = [row for row in trainer.logger.rows if "train/loss" in row]
    return [{k.removeprefix("train/"): v for k, v in row.items() if "train/" in k} for row in rows]


def test_a_step_logs_what_its_reward_is_made_of_and_how_its_gradient_is(tmp_path):
    module = build()
    first, second = train_rows(fit(module, tmp_path))
    assert first.keys() == second.keys() == LOGGED
    for row in (first, second):
        parts = row["reward/text_relevant"] + 0.3 * row["reward/text_irrelevant"]
        assert row["reward_mean"] == pytest.approx(parts, rel=1e-5)
        assert row["loss"] == pytest.approx(-row["reward_mean"], rel=1e-5)
        assert 0 < row["reward/common_share"] <= 1
        assert row["penalty"] == 0
        # The gradients of two steps make the whole.
        norms = [row["step_grad_norm/0"], row["step_grad_norm/1"]]
        assert abs(norms[0] - norms[1]) < row["grad_norm"] < sum(norms)
        assert min(row["images_per_second"], row["tflops_per_second"]) > 0
    assert first["lora_norm"] > 0
    assert first["grad_norm"] != second["grad_norm"]
    for number, row in enumerate((first, second)):
        plan = module.step_settings.plan(0, number)
        assert row["offset"] == plan.train_steps[0]
        factors = Chain.of(STEPS, module.generator.schedule, plan).trained_factors
        assert row["factor_sum"] == pytest.approx(sum(map(abs, factors.values())), rel=1e-6)


def test_renoised_copies_are_logged_beside_the_images_own_reward(tmp_path):
    module = build(redness, strategy=DRaFTLV(num_renoised=2))
    for row in train_rows(fit(module, tmp_path)):
        assert row["loss"] == pytest.approx(-row["reward_mean"], rel=1e-5)
        assert abs(row["reward/renoised"] - row["reward_mean"]) > 1e-5


def test_texts_are_read_once_a_step(tmp_path):
    """Captions, and the negative prompt, whatever is sampled at a time and also learnt from."""
    module = build(
        Brightness(), diffusion_weight=0.5, memory=StepMemory(rollout_batch_size=1)
    )  # fmt: skip
    module.configure_model()
    read, encode = [], module.conditioner.forward

    def watched(captions):
        assert not torch.is_grad_enabled()
        read.append(len(captions))
        return encode(captions)

    module.conditioner.forward = watched
    fit(module, tmp_path, 2, data=Captions(images=True))
    assert read == [3, 1] * 2


def test_one_trained_step_has_the_whole_gradient(tmp_path):
    settings = {"strategy": DRTune(num_train_steps=1), "lora": None}
    module = build(penalty=PenaltySettings(weight=2.0), **settings)
    _, row = train_rows(fit(module, tmp_path))
    assert LOGGED - row.keys() == {"step_grad_norm/1", "lora_norm"}
    assert row["step_grad_norm/0"] == pytest.approx(row["grad_norm"], rel=1e-5)
    assert row["penalty"] > 0  # at the first step, it was still zero


@pytest.mark.parametrize("peak", [None, 2e12])
def test_the_share_of_the_peak_is_logged_where_that_is_known(peak, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_modules.step_speed.get_available_flops", lambda *_: peak)
    row, _ = train_rows(fit(build(), tmp_path))
    assert ("mfu" in row) == (peak is not None)
    if peak is not None:
        assert row["mfu"] == pytest.approx(row["tflops_per_second"] / 2, rel=1e-5)


def test_another_decoder_is_trained_through_and_its_bias_is_logged(tmp_path):
    module = build(decoder=Known(ToyCodec(seed=9).float()))
    row, _ = train_rows(fit(module, tmp_path))
    assert row.keys() == LOGGED | {"decoder_bias/cosine", "decoder_bias/norm_ratio"}
    assert abs(row["decoder_bias/cosine"]) < 1
    same = build(decoder=Known(ToyCodec().float()))
    row, _ = train_rows(fit(same, tmp_path))
    assert row["decoder_bias/cosine"] == pytest.approx(1, abs=1e-5)
    plain = build()
    fit(plain, tmp_path)
    torch.testing.assert_close(weights(same), weights(plain))
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(weights(module), weights(plain))


def test_a_batch_is_one_optimizer_step_and_the_rate_follows(tmp_path):
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    module = build(memory=StepMemory(rollout_batch_size=1, decode_batch_size=1))
    module.make_optimizer = partial(Watched, lr=0.6)
    module.make_lr_scheduler = partial(
        torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda n: 1 / (1 + n)
    )
    ema = EMA(decay=0.5, warmup=False)
    trainer = fit(module, tmp_path, 3, callbacks=[ema])
    assert trainer.global_step == len(trainer.logger.of("train/loss")) == 3
    assert rates == pytest.approx([0.6, 0.3, 0.2])
    assert module.ema.num_updates == 3


def test_an_average_follows_every_step(tmp_path):
    seen = [start()]
    module = build()

    class Keep(pl.Callback):
        def on_train_batch_end(self, *_):
            seen.append(weights(module))

    fit(module, tmp_path, 3, callbacks=[EMA(decay=0.5, warmup=False), Keep()])
    for name, average in module.ema.weights.items():
        expected = seen[0][name] / 8 + seen[1][name] / 8 + seen[2][name] / 4 + seen[3][name] / 2
        torch.testing.assert_close(average, expected)


@pytest.mark.parametrize(("max_norm", "is_clipped"), [(1e-3, True), (None, False)])
def test_long_gradients_are_clipped(max_norm, is_clipped, tmp_path):
    """With plain descent, a step is as long as the clipped gradient times the rate."""
    module = build(lr=0.5, max_grad_norm=max_norm, lora=None)
    (row,) = train_rows(fit(module, tmp_path, 1))
    before, after = start(lora=None), weights(module)
    moved = torch.cat([(after[name] - before[name]).flatten() for name in after]).norm().item()
    length = 1e-3 if is_clipped else row["grad_norm"]
    assert row["grad_norm"] > 2e-3
    assert moved == pytest.approx(0.5 * length, rel=2e-3)


@pytest.mark.parametrize("size", [None, 2])
def test_rows_that_are_not_valid_change_no_weight(size, tmp_path):
    memory = StepMemory(rollout_batch_size=size)
    found = []
    for valid in ((True, True, True), (True, True, True, False)):
        module = build(Brightness(), memory=memory, max_grad_norm=None, lr=0.5)
        rows = train_rows(fit(module, tmp_path, data=Captions(valid)))
        found.append((weights(module), rows))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-6)
    for name in ("loss", "reward_mean", "grad_norm"):
        values = [[row[name] for row in rows] for _, rows in found]
        assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_what_is_logged_does_not_change_the_weights(tmp_path):
    found = []
    for every in (1, 1000):
        module = build(
            decoder=Known(ToyCodec(seed=9).float()),
            # Three samples by two: pairs of different steps could share a call.
            memory=StepMemory(replay_batch_size=2, decode_batch_size=1),
        )
        trainer = fit(module, tmp_path, log_every_n_steps=every)
        found.append(weights(module))
        assert bool(train_rows(trainer)) == (every == 1)
    assert_equal(*found)


def resumable():
    return build(optimizer=partial(torch.optim.Adam, lr=0.01))


def run_settings():
    return {
        "callbacks": [EMA(decay=0.5), RunCheckpoint(every_n_steps=2)],
        "plugins": [SafetensorsCheckpointIO()],
    }


def test_a_resumed_run_goes_on_bit_by_bit(tmp_path):
    whole = resumable()
    fit(whole, tmp_path / "whole", 4, **run_settings())
    half = resumable()
    fit(half, tmp_path / "parts", 2, **run_settings())
    resumed = resumable()
    checkpoint = tmp_path / "parts" / "checkpoints" / "step-00000002"
    trainer = fit(resumed, tmp_path / "parts", 4, ckpt_path=str(checkpoint), **run_settings())
    assert len(train_rows(trainer)) == 2
    assert_equal(weights(resumed), weights(whole))
    assert_equal(resumed.ema.weights, whole.ema.weights)
    mean = whole.reward.common_direction.mean
    assert mean.dtype == torch.float64
    assert torch.equal(resumed.reward.common_direction.mean, mean)
    assert not torch.equal(half.reward.common_direction.mean, mean)


def test_checkpoints_hold_what_is_trained_and_nothing_else(tmp_path):
    module = build(
        lora=None,
        penalty=PenaltySettings(),
        decoder=Known(ToyCodec(seed=9).float()),
        held_out={"other": ClipSource()},
    )
    fit(module, tmp_path, 2, **run_settings())
    assert {"reference_unet", "held_out_networks", "decoder", "reward"} <= {
        name for name, _ in module.named_children()
    }
    stored = read_tensors(tmp_path / "checkpoints" / "step-00000002" / "model.safetensors")
    assert stored.keys() == trainable_parameters(module).keys()
    assert all(name.startswith("unet.") for name in stored)


@pytest.mark.parametrize("lora", [LORA, None])
def test_mixed_precision_keeps_the_weights_and_the_reward_in_float32(lora, tmp_path):
    seen, moves = [], []

    def reward(images, captions):
        seen.append(images.dtype)
        return images.mean(dim=(1, 2, 3))

    before = start(lora=lora)
    for precision in ("32-true", "bf16-mixed"):
        module = build(reward, lora=lora, max_grad_norm=None)
        fit(module, tmp_path, 1, precision=precision)
        after = weights(module)
        assert all(weight.dtype == torch.float32 for weight in after.values())
        moves.append(torch.cat([(after[name] - before[name]).flatten() for name in after]))
    assert {*seen} == {torch.float32}
    assert not torch.equal(*moves)
    assert torch.cosine_similarity(*moves, dim=0) > 0.95


def test_adapters_are_trained_over_a_base_of_lower_precision(tmp_path):
    module = build(Brightness(), base=TinyBase(torch.bfloat16))
    fit(module, tmp_path, 1, precision="bf16-mixed")
    for name, weight in weights(module).items():
        assert weight.dtype == torch.float32
        assert ("lora_A" in name) or weight.any(), name  # the second factor starts at zero
    whole = build(base=TinyBase(torch.bfloat16), lora=None)
    with pytest.raises(ConfigError, match=r"^expected trained weights in float32; "):
        whole.configure_model()


def test_validation_scores_by_the_reward_and_by_those_that_are_held_out(tmp_path):
    reward, held_out = Brightness(), Brightness()
    module = build(reward, held_out={"bright": Known(held_out), "clip": ClipSource()})
    trainer = fit(module, tmp_path, limit_val_batches=1.0, val_check_interval=1)
    (row, other) = (row for row in trainer.logger.rows if "val/reward_mean" in row)
    parts = {f"val/held_out/clip/{name}" for name in ("text_relevant", "text_irrelevant",
                                                      "common_share")}  # fmt: skip
    names = {"reward_mean", "held_out/bright", "held_out/clip", "non_finite_images"}
    assert {f"val/{name}" for name in names} | parts == {
        name for name in row if name.startswith("val/")
    }
    batch = CaptionStream(50, (True, True, False), False).batch(50)
    images = module.generate(batch["captions"], batch["sample_ids"].tolist(), module.eval_seed)
    expected = images[:2].mean().item()  # the third row is not valid
    assert other["val/reward_mean"] == pytest.approx(expected, rel=1e-5)
    assert other["val/held_out/bright"] == other["val/reward_mean"] != row["val/reward_mean"]
    # Watching needs no gradient; training does, and leaves what is held out alone.
    assert held_out.calls == [(False, False)] * 2
    assert reward.calls.count((True, True)) == 2
    assert held_out.scale.grad is None
    assert all(weight.grad is None for weight in module.held_out_networks.parameters())


def test_validation_leaves_everything_as_it_was(tmp_path):
    module = build(held_out={"other": CLIP})
    fit(module, tmp_path)
    module.log = lambda *_args, **_settings: None
    mean = module.reward.common_direction.mean.clone()
    before, random = weights(module), torch.get_rng_state()
    modes = {name: part.training for name, part in module.named_modules()}
    assert module.reward.common_direction.training
    module.validation_step(CaptionStream(50, (True, True), False).batch(50), 0)
    assert torch.equal(module.reward.common_direction.mean, mean)
    assert torch.equal(torch.get_rng_state(), random)
    assert_equal(weights(module), before)
    assert modes == {name: part.training for name, part in module.named_modules()}


def test_validating_between_steps_changes_no_step(tmp_path):
    found = []
    for batches in (0, 1):
        module = build(held_out={"other": CLIP})
        fit(module, tmp_path, 3, limit_val_batches=batches, val_check_interval=1)
        found.append(weights(module) | {"V": module.reward.common_direction.mean})
    assert_equal(*found)


def test_frozen_parts_evaluate_and_an_average_learns_in_training_alone():
    module = build()
    module.configure_model()
    assert module.reward.common_direction.training
    assert not module.reward.scorer.training
    assert not module.text_models.text_model.training
    assert not module.eval().reward.common_direction.training
    assert module.train().reward.common_direction.training


def settings_of(**init_args):
    """A module as a config has it."""
    base = {"class_path": "toy_tuning.TinyBase", "init_args": {}}
    return {
        "class_path": "lightning_modules.reward_finetuning.RewardFineTuningModule",
        "init_args": {
            "base": base,
            "reward": {
                "class_path": "segalign.rewards.zoo.PickScore",
                "init_args": {"model": "no/such-model"},
            },
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
            "text": {"token_budget": 8},
            "lora": {"rank": 2},
            "sampler": {"num_inference_steps": 1},
            **init_args,
        },
    }


def test_what_only_makes_images_needs_no_reward(tmp_path):
    settings = settings_of(base={"class_path": "segalign.scenes.base.ScenesBase", "init_args": {
        "world": "2x2", "generator": "random", "text_model": "random"}})  # fmt: skip
    module = build_module(settings)
    with pytest.raises(ConfigError, match=r"no/such-model"):
        module.configure_model()
    module = build_module(settings)
    module.needs_objective = False
    torch.manual_seed(0)
    module.configure_model()
    state = {name: weight + 0.1 for name, weight in trainable_state_dict(module).items()}
    tree = {"state_dict": state, "global_step": 1, "run_config": {"model": settings}}
    save_checkpoint(tree, tmp_path / "step-00000001")
    loaded = load_module(tmp_path / "step-00000001")
    assert not hasattr(loaded, "reward")
    assert_equal(weights(loaded), state)
    images = loaded.generate(["A red square."], [0], 1)
    module.load_state_dict(state, strict=False)
    assert torch.equal(images, module.eval().generate(["A red square."], [0], 1))


def test_the_denoising_loss_is_added_with_its_factor(tmp_path):
    data, found = partial(Captions, images=True), {}
    for factor in (0.0, 0.5):
        module = build(
            Brightness(), diffusion_weight=factor, max_grad_norm=None, lr=1.0, lora=None,
            memory=StepMemory(rollout_batch_size=2),
        )  # fmt: skip
        (row,) = train_rows(fit(module, tmp_path, 1, data=data()))
        found[factor] = weights(module), row
    plain = build(lora=None)
    plain.configure_model()
    data = CaptionStream(0, (True,) * 3, True).batch(0)
    with torch.no_grad():
        text = plain.generator.conditioner(data["captions"])
    losses = denoising_gradient(
        plain.generator, plain.diffusion_loss, data, text, 0,
        weight=0.5, batch_size=None, backward=lambda loss, _is_last: loss.backward(),
    )  # fmt: skip
    for name, weight in trainable_parameters(plain).items():
        difference = found[0.0][0][name] - found[0.5][0][name]
        torch.testing.assert_close(difference, weight.grad, rtol=1e-3, atol=1e-6)
    assert found[0.5][1].keys() - found[0.0][1].keys() == {"denoising_loss"}
    assert found[0.5][1]["denoising_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found[0.5][1]["loss"] == pytest.approx(found[0.0][1]["loss"], rel=1e-5)


def one_line(error, start):
    return pytest.raises(error, match=rf"^{start}[^\n]*$")


KL = PenaltySettings(kind="kl")
REFUSED_SETTINGS = {
    "more trained steps than steps": (
        {"strategy": DRTune(num_train_steps=4)},
        r"`num_train_steps` must be <= the number of inference steps \(3\); got 4\. ",
    ),
    "early stop": (
        {"strategy": DRTune(num_train_steps=2, early_stop=3)},
        r"`early_stop` must be < the number of inference steps \(3\); got 3\. ",
    ),
    "a range beyond the steps": (
        {"strategy": ReFL()},
        r"`last_step` must be < the number of inference steps \(3\); got 39\. ",
    ),
    "replay of a sampler that clips": (
        {"engine": "replay", "rollout_sampler": ClippedSampler(num_inference_steps=3)},
        r"expected a strategy that `engine: replay` can serve; got one that comes with a sampler ",
    ),
    "a divergence without noise": (
        {"penalty": KL},
        r"expected DDIM with `eta` > 0, .* for a penalty of kind `kl`; got DDIMSampler",
    ),
    "a divergence of the last step": (
        {
            "penalty": KL,
            "strategy": DRaFT(),
            "rollout_sampler": DDIMSampler(num_inference_steps=3, eta=1.0),
        },
        r"expected a strategy that trains steps with injected noise .* got `DRaFT`, which ",
    ),
    "replay of attached inputs": (
        {"engine": "replay", "strategy": DRaFT(num_train_steps=2)},
        r"expected a strategy that `engine: replay` can serve; got one that attaches inputs; ",
    ),
}


@pytest.mark.parametrize("case", REFUSED_SETTINGS)
def test_settings_that_do_not_fit_are_refused_before_anything_is_loaded(case):
    settings, message = REFUSED_SETTINGS[case]
    with one_line(ConfigError, message):
        build(**settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(ReFL, first_step=3, last_step=2), r"`last_step` must be >= .* trains no step\. "),
        (partial(DRTune, num_train_steps=0), r"`num_train_steps` must be at least 1; got 0\. "),
        (
            partial(DDIMSampler, guidance_scale=1.0, guidance_interval=(0, 500)),
            r"guidance `interval` has no effect at `scale` 1; got \(0, 500\)\. ",
        ),
    ],
)
def test_parts_that_make_no_sense_refuse_themselves(make, message):
    with one_line(ConfigError, message):
        make()


REFUSED_MODELS = {
    "adapters of nothing": (
        {"lora": LoraSettings(target_modules="no_such_module")},
        r"expected `lora\.target_modules` that match modules of the network; got `no_such_module`",
    ),
    "an adapter that learns": (
        {"text": TextEncoding(context="t5", t5=T5Branch(init="random", model="tiny"))},
        r"expected the denoising network alone .* `text\.t5\.train_adapter` to false",
    ),
}


@pytest.mark.parametrize("case", REFUSED_MODELS)
def test_models_that_cannot_be_trained_are_refused_when_they_are_built(case):
    settings, message = REFUSED_MODELS[case]
    with one_line(ConfigError, message):
        build(**settings).configure_model()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clip_val": 1.0}, r".*`trainer\.gradient_clip_val` 1\.0; .*max_grad_norm"),
        ({"accumulate_grad_batches": 2}, r".*`trainer\.accumulate_grad_batches` 2; leave it out"),
        ({"precision": "16-true"}, r".*`trainer\.precision` 16-true; use `bf16-mixed` or "),
        (
            {"precision": "bf16-true"},
            r"expected trained weights in float32; .*`bf16-mixed`",
        ),
    ],
)
def test_settings_of_the_trainer_that_cannot_be_followed_are_refused(settings, message, tmp_path):
    with one_line(ConfigError, message):
        fit(build(), tmp_path, **settings)


def test_half_precision_is_refused_on_every_device():
    """Lightning itself changes it on the CPU."""
    fitting = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).state
    fitting.fn = "fit"
    trainer = SimpleNamespace(
        state=fitting,
        gradient_clip_val=None,
        accumulate_grad_batches=1,
        precision="16-mixed",
        strategy=DDPStrategy(),
    )
    with one_line(ConfigError, r".*got `trainer\.precision` 16-mixed; use `bf16-mixed` or "):
        check_trainer(trainer)
    trainer.precision = "bf16-mixed"
    check_trainer(trainer)
    for sharded in (FSDPStrategy(), ModelParallelStrategy()):
        trainer.strategy = sharded
        with one_line(ConfigError, rf".*got `{type(sharded).__name__}`; use `ddp` or layer config"):
            check_trainer(trainer)
    trainer.strategy = ShardedStrategy()
    check_trainer(trainer)


REFUSED_DATA = {
    "micro-batches": ({"accumulate": 2}, {}, r".*got `data\.accumulate` 2; leave it out"),
    "dropped captions": (
        {"caption_dropout": 0.1}, {}, r"expected whole captions .* `data\.caption_dropout` 0\.1; "
    ),
    "captions for images": (
        {"content": "caption"},
        {"diffusion_weight": 0.1},
        r"expected images for `diffusion_weight`; got data of content `caption`; ",
    ),
    "captions alone": (
        {}, {"diffusion_weight": 0.1}, r"expected images for `diffusion_weight`; got captions alone"
    ),
    "an estimate from one caption": (
        {"global_batch_size": 1},
        {"reward": ClipSource()},
        r"expected at least 2 captions in a global batch .* got 1, ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_DATA)
def test_data_that_does_not_fit_is_refused(case, tmp_path):
    data, settings, message = REFUSED_DATA[case]
    module = build(**settings)
    with one_line(ConfigError, message):
        fit(module, tmp_path, data=Captions(**data))
    assert_equal(weights(module), start())


def test_captions_without_text_are_refused(tmp_path):
    class Blank(Captions):
        def train_dataloader(self):
            loader = super().train_dataloader()
            make = loader.dataset.batch
            loader.dataset.batch = lambda number: make(number) | {"captions": ["A.", " \n", "B."]}
            return loader

    message = r"expected captions with text for a reward; got blank ones for samples 1; "
    with one_line(DataError, message):
        fit(build(), tmp_path, data=Blank())
    fit(build(), tmp_path, 1, data=Captions((True, False)))  # where nothing is asked for, none is


def assert_skipped(module, tmp_path, reason, ids):
    """Fit a step that is not finite: it changes nothing, and says what was found."""
    module.configure_model()
    before = weights(module)
    trainer = fit(module, tmp_path, 1)
    assert trainer.global_step == 1
    assert module.skipped == SkippedStep(0, reason, ids)
    assert not trainer.optimizers[0].state
    assert math.isnan(trainer.logger.of("train/grad_norm")[0])
    assert_equal(weights(module), before)


def test_a_reward_that_is_not_finite_is_named(tmp_path):
    def broken(images, captions):
        return torch.stack([image.mean() * (math.nan if i == 1 else 1.0)
                            for i, image in enumerate(images)])  # fmt: skip

    parts = {"good": WeightedReward(reward=Brightness()), "bad": WeightedReward(reward=broken)}
    reason = "the losses of 1 samples are not finite (the reward: `bad` for rows [1])"
    assert_skipped(build(RewardMixture(parts)), tmp_path, reason, (1,))


def test_a_copy_that_is_not_finite_is_named(tmp_path):
    def broken(images, captions):
        calls.append(len(images))
        return images.mean(dim=(1, 2, 3)) * (math.nan if len(calls) == 3 else 1.0)

    calls = []
    module = build(broken, strategy=DRaFTLV(num_renoised=2))
    reason = "the losses of 3 samples are not finite (the reward: `rewards` for rows [0, 1, 2])"
    assert_skipped(module, tmp_path, reason, (0, 1, 2))


def test_a_penalty_that_is_not_finite_is_named(tmp_path):
    module = build(Brightness(), lora=None, penalty=PenaltySettings())
    module.configure_model()
    module.reference_unet.conv_out.bias.data.fill_(math.nan)
    reason = "the losses of 3 samples are not finite (the penalty for rows [0, 1, 2])"
    assert_skipped(module, tmp_path, reason, (0, 1, 2))


def test_a_part_that_is_not_finite_is_named_where_losses_are_finite(tmp_path):
    class Odd:
        def bind(self, captions):
            def call(images, rows):
                means = images.mean(dim=(1, 2, 3))
                steep = (means - means.detach()).abs().sqrt()
                return RewardTerms(steep, {"odd": means.detach() / 0})

            return call

    module = build(Odd())
    fit(module, tmp_path, 1)
    assert module.skipped.sample_ids == (0, 1, 2)
    assert module.skipped.reason.startswith("the losses are finite, and their gradient is not: `")
    assert module.skipped.reason.endswith(", ... (the reward: `odd` for rows [0, 1, 2])")


def test_a_gradient_that_is_not_finite_is_skipped(tmp_path):
    def steep(images, captions):
        return (images - images.detach()).mean(dim=(1, 2, 3)).abs().sqrt()

    module = build(steep)
    module.configure_model()
    before = weights(module)
    fit(module, tmp_path)
    assert module.skipped.step == 1
    assert module.skipped.sample_ids == (4, 5, 6)
    assert_equal(weights(module), before)


def test_a_reward_without_gradient_is_refused_by_its_name(tmp_path):
    class Rounded(nn.Module):
        def forward(self, images, captions):
            return images.mean(dim=(1, 2, 3)).detach()

    message = r"expected values of the reward `Rounded` with a gradient to the images; "
    with one_line(ConfigError, message):
        fit(build(Rounded()), tmp_path)
