"""A run's module from its checkpoint alone: the weights of the run, and nothing unsafe."""

import json

import pytest
import torch
from tiny_run import SCENES, STABLE_DIFFUSION, model_settings, write_run

from lightning_modules.run_loading import build_module, load_module
from segalign.errors import ConfigError, DataError
from segalign.run_format import load_checkpoint, read_tensors, save_checkpoint
from segalign.trainable import trainable_parameters


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    write_run(run_dir, model_settings(lora={"rank": 2}))
    return run_dir


def test_the_trained_weights_and_their_average_are_there(run):
    module = load_module(run)
    checkpoint = run / "checkpoints" / "step-00000003"
    raw = read_tensors(checkpoint / "model.safetensors")
    average = read_tensors(checkpoint / "ema.safetensors")
    trained = trainable_parameters(module)
    assert trained.keys() == average.keys()
    assert all("lora_" in name for name in trained)
    assert all(torch.equal(parameter, raw[name]) for name, parameter in trained.items())
    with module.weights("ema"):
        assert all(torch.equal(parameter, average[name]) for name, parameter in trained.items())
    assert not any(part.training for part in module.modules())


def test_loading_is_repeatable_and_leaves_the_random_state_alone(run):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = load_module(run), load_module(run / "checkpoints" / "step-00000003")
    assert torch.equal(torch.get_rng_state(), before)
    images = [module.generate(["A fox."], [0], 1) for module in (first, second)]
    assert torch.equal(*images)


def change(run, tmp_path, **changes):
    tree = load_checkpoint(run / "checkpoints" / "step-00000003")
    changed = tmp_path / "step-00000003"
    save_checkpoint({**tree, **changes}, changed)
    return changed


def test_weights_of_another_model_are_refused(run, tmp_path):
    state = load_checkpoint(run / "checkpoints" / "step-00000003")["state_dict"]
    name = min(state)
    missing = {key: value for key, value in state.items() if key != name}
    with pytest.raises(DataError, match=rf"`{name}` is missing instead of \("):
        load_module(change(run, tmp_path, state_dict=missing))
    with pytest.raises(DataError, match=rf"`{name}` is \(1, 1\) instead of"):
        load_module(change(run, tmp_path, state_dict={**state, name: torch.zeros(1, 1)}))
    with pytest.raises(DataError, match=r"`surplus` is \(1,\) instead of missing"):
        load_module(change(run, tmp_path, state_dict={**state, "surplus": torch.zeros(1)}))
    config = {"model": model_settings(STABLE_DIFFUSION, lora={"rank": 2})}
    with pytest.raises(DataError, match="instead of"):
        load_module(change(run, tmp_path, run_config=config))


def test_a_config_reaches_no_foreign_code(run, tmp_path):
    hostile = {"class_path": "os.system", "init_args": {"command": f"touch {tmp_path}/pwned"}}
    for settings in (hostile, model_settings(hostile), model_settings(optimizer=hostile)):
        with pytest.raises(ConfigError):
            load_module(change(run, tmp_path, run_config={"model": settings}))
    assert not (tmp_path / "pwned").exists()


def test_classes_of_another_package_need_permission(run, tmp_path):
    toy = {"class_path": "toy_house.ToyModule", "init_args": {}}
    other = change(run, tmp_path, run_config={"model": toy})
    with pytest.raises(ConfigError, match="--allow_import toy_house"):
        load_module(other)
    with pytest.raises(DataError, match="ToyModule"):
        load_module(other, allow_import=["toy_house"])
    with pytest.raises(ConfigError, match="--allow_import toy_house"):
        load_module(other)


def test_checkpoints_that_cannot_be_used(run, tmp_path):
    with pytest.raises(ConfigError, match="found nothing"):
        load_module(tmp_path / "none")
    with pytest.raises(ConfigError, match="a checkpoint without one"):
        load_module(change(run, tmp_path, run_config=None))
    config = {"model": model_settings(SCENES, colour="red")}
    with pytest.raises(ConfigError, match="colour"):
        load_module(change(run, tmp_path, run_config=config))
    damaged = change(run, tmp_path)
    state = json.loads((damaged / "state.json").read_text())
    (damaged / "state.json").write_text(json.dumps({**state, "global_step": 4}))
    with pytest.raises(DataError, match=r"`state\.json` has "):
        load_module(damaged)


@pytest.mark.parametrize("kind", ["sampler.EulerSampler", "clipped_sampler.ClippedSampler"])
def test_samplers_with_settings_of_another_stay_what_they_are(kind):
    # The parser forgets the class path; DDIM, which comes first in the type, takes most settings.
    sampler = {"class_path": f"segalign.diffusion.{kind}", "init_args": {"num_inference_steps": 6}}
    settings = {
        "class_path": "lightning_modules.reward_finetuning.RewardFineTuningModule",
        "init_args": {
            "base": SCENES,
            "optimizer": {"class_path": "torch.optim.AdamW"},
            "reward": {"class_path": "segalign.scenes.rewards.ScenesReward"},
            "rollout_sampler": sampler,
        },
    }
    module = build_module(settings)
    assert type(module.step_settings.sampler).__name__ == kind.partition(".")[2]
