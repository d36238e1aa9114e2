"""``main.py export --format clip``: a trained scorer that rewards and transformers load."""

import pytest
import torch
from tiny_run import STABLE_DIFFUSION, model_settings, write_run
from transformers import CLIPModel

from lightning_modules.run_loading import load_module
from segalign.commands import export
from segalign.errors import ConfigError
from segalign.rewards.zoo import HuggingFaceClip

PREFERENCE = "lightning_modules.segment_preference.SegmentPreferenceModule"
SOURCE = "segalign.rewards.scorer_source.PretrainedScorer"
CAPTIONS = ["A red circle. A blue square sits below it.", "One thing."]


def preference_settings(**changes):
    return {
        "class_path": PREFERENCE,
        "init_args": {
            "scorer": {"class_path": SOURCE, "init_args": {"model": "tiny", "init": "random"}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            **changes,
        },
    }


def run_export(run_dir, out, kind="clip"):
    arguments = ["--checkpoint", str(run_dir), "--format", kind, "--out", str(out)]
    return export.run(arguments, load_module)


@pytest.mark.parametrize("trained", [None, {"lora": {"rank": 2}}], ids=["whole", "lora"])
def test_the_folder_scores_as_the_run_does(tmp_path, trained):
    write_run(tmp_path / "run", preference_settings(trained=trained), ema=False)
    assert run_export(tmp_path / "run", tmp_path / "out") == 0
    module = load_module(tmp_path / "run")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        texts = module.scorer.segment_features(CAPTIONS).mean()
        expected = (module.scorer.image_features(images) * texts).sum(-1)
    reward = HuggingFaceClip(model=str(tmp_path / "out"), text="segments").load()
    torch.testing.assert_close(reward(images, CAPTIONS), expected, rtol=0, atol=1e-6)
    theirs = CLIPModel.from_pretrained(tmp_path / "out")
    assert theirs.logit_scale.shape == ()
    assert not [name for name in theirs.state_dict() if "lora" in name]


def test_another_kind_of_run_is_one_line(tmp_path):
    write_run(tmp_path / "preference", preference_settings())
    write_run(tmp_path / "images", model_settings(STABLE_DIFFUSION))
    with pytest.raises(ConfigError, match="expected a run of a preference model in .* for"):
        run_export(tmp_path / "images", tmp_path / "out")
    with pytest.raises(ConfigError, match="expected a run of a text-to-image model in .* for"):
        run_export(tmp_path / "preference", tmp_path / "out", kind="diffusers")
    assert not (tmp_path / "out").exists()
