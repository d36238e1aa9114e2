"""``main.py export --format clip``: a trained scorer that rewards and transformers load."""

import copy
import re

import pytest
import torch
from tiny_run import STABLE_DIFFUSION, model_settings, write_run
from transformers import CLIPModel

from lightning_modules.run_loading import load_module
from segalign.commands import export
from segalign.errors import ConfigError
from segalign.formats.clip_scorer import load_clip_scorer
from segalign.rewards.direction_checks import text_digest
from segalign.rewards.segment_scorer import SegmentScorer
from segalign.rewards.zoo import HuggingFaceClip
from segalign.run_directory import META_FILE, file_digest

PREFERENCE = "lightning_modules.segment_preference.SegmentPreferenceModule"
SOURCE = "segalign.rewards.scorer_source.PretrainedScorer"
WINDOWS = {"class_path": "segalign.text.windows.WindowSegmenter", "init_args": {"num_tokens": 5}}
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


def readme_code(text):
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


@pytest.mark.parametrize(
    ("settings", "how_read"),
    [
        ({"segmenter": WINDOWS}, 'segments {"name": "window", "num_tokens": 5}'),
        ({"text": "whole"}, "whole"),
    ],
    ids=["segments", "whole"],
)
def test_the_readme_says_how_to_read_captions(tmp_path, settings, how_read):
    objective = {"margin": 0.5, "segment_contrastive": 2.0}
    path = write_run(tmp_path / "run", preference_settings(objective=objective, **settings))
    assert run_export(tmp_path / "run", tmp_path / "out") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "- Started from: `` PretrainedScorer(model='tiny', init='random') ``",
        "- Trained: `` TrainedParts(",
        "- Losses: `` 0.5 margin, 2 segment_contrastive ``",
        "- Optimizer steps: `` 3 ``",
        "- Weights: `` moving average ``",
        f"- Checkpoint: `` {file_digest(path / META_FILE)} ``",
        f"- Captions: `` {how_read} ``",
    ):
        assert fact in text
    assert str(tmp_path) not in text
    # Its code scores as the run does.
    module = load_module(tmp_path / "run")
    known = {"images": torch.rand(2, 3, 32, 32), "captions": CAPTIONS}
    exec(readme_code(text).replace("FOLDER", str(tmp_path / "out")), known)
    with module.weights("ema"), torch.no_grad():
        texts = module.scorer.segment_features(CAPTIONS).mean()
        expected = (module.scorer.image_features(known["images"]) * texts).sum(-1)
    torch.testing.assert_close(known["scores"], expected, rtol=0, atol=1e-6)


def test_the_temperature_is_within_its_bound(tmp_path):
    write_run(tmp_path / "run", preference_settings(max_logit_scale=7.5), ema=False)
    assert load_module(tmp_path / "run").scorer.logit_scale.exp() > 8
    assert run_export(tmp_path / "run", tmp_path / "out") == 0
    exported = CLIPModel.from_pretrained(tmp_path / "out").logit_scale
    assert exported.exp().item() == pytest.approx(7.5)
    assert "Inverse temperature: `` 7.5 ``" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_with_adapters_has_the_digest_of_its_folder(tmp_path):
    """So that a common direction of the one serves the other."""
    lora = {"rank": 2, "target_modules": r".*(q_proj|fc1|text_projection)"}
    write_run(tmp_path / "run", preference_settings(trained={"lora": lora}), ema=False)
    assert run_export(tmp_path / "run", tmp_path / "out") == 0
    module = load_module(tmp_path / "run")
    before = copy.deepcopy(module.scorer.state_dict())
    digest = text_digest(module.scorer)
    assert digest == text_digest(SegmentScorer(load_clip_scorer(str(tmp_path / "out"))))
    after = module.scorer.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with torch.no_grad():
        module.scorer.model.text_projection.lora_B["default"].weight[0, 0] += 1
    assert text_digest(module.scorer) != digest


def test_another_kind_of_run_is_one_line(tmp_path):
    write_run(tmp_path / "preference", preference_settings())
    write_run(tmp_path / "images", model_settings(STABLE_DIFFUSION))
    with pytest.raises(ConfigError, match=r"expected a run of a preference model in .* for"):
        run_export(tmp_path / "images", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"expected a run of a text-to-image model in .* for"):
        run_export(tmp_path / "preference", tmp_path / "out", kind="diffusers")
    assert not (tmp_path / "out").exists()
