"""Rewards by name, those of other packages included."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from segalign.errors import ConfigError
from segalign.rewards.aesthetic import Aesthetic
from segalign.rewards.protocol import RewardSource
from segalign.rewards.registry import (
    NamedReward,
    available_rewards,
    build_reward,
    describe_reward,
)
from segalign.rewards.zoo import Denscore, Hpsv21
from segalign.text.segmenter import OfficialSegmenter

OWN = ["aesthetic", "clip_h", "denscore", "hpsv2", "hpsv2.1", "pickscore"]
DOCUMENT = Path(__file__).parents[3] / "docs" / "rewards.md"
MORE = """

def dark(target: float = 0.0):
    return Brightness(target=target)


def nothing():
    return 1
"""
ENTRY_POINTS = """
[segalign.rewards]
brightness = my_rewards:Brightness
dark = my_rewards:dark
nothing = my_rewards:nothing
gone = my_rewards:Gone
lost = my_lost_rewards:Lost
denscore = my_rewards:Brightness
"""


def documented(language):
    """Find the examples of the documents in a language."""
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Install a package, as far as its metadata go."""
    (tmp_path / "my_rewards.py").write_text(documented("python")[-1] + MORE)
    facts = tmp_path / "my_rewards-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: my-rewards\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)


def refused(name, **settings):
    with pytest.raises(ConfigError) as caught:
        describe_reward(name, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_own_rewards():
    assert available_rewards() == OWN
    for name in OWN:
        assert callable(describe_reward(name).load)
    assert describe_reward("hpsv2.1") == Hpsv21()
    assert describe_reward("aesthetic", crop=504) == Aesthetic(crop=504)


def test_settings_may_be_objects_or_what_a_config_has():
    segmenter = OfficialSegmenter()
    assert describe_reward("denscore", segmenter=segmenter) == Denscore(segmenter=segmenter)
    described = {"class_path": "segalign.text.segmenter.OfficialSegmenter"}
    source = describe_reward("denscore", segmenter=described)
    assert isinstance(source.segmenter, OfficialSegmenter)


def test_a_reward_of_another_package(package):
    assert set(available_rewards()) == {*OWN, "brightness", "dark", "nothing", "gone", "lost"}
    images = torch.full((2, 3, 4, 4), 0.25)
    captions = ["a", "b"]
    assert build_reward("brightness")(images, captions).tolist() == [-0.25, -0.25]
    named = NamedReward(name="brightness", settings={"target": 0.25})
    assert named.load()(images, captions).tolist() == [0, 0]
    assert build_reward("dark")(images, captions).tolist() == [-0.25, -0.25]


def test_the_documented_entry_point_is_the_tested_one():
    (toml,) = documented("toml")
    described = tomllib.loads(toml)["project"]["entry-points"]["segalign.rewards"]
    assert described == {"brightness": "my_rewards:Brightness"}


@pytest.mark.parametrize("number", range(3))
def test_the_documented_configs_work(number):
    config = yaml.safe_load(documented("yaml")[number])["reward"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=RewardSource)
    source = parser.instantiate(parser.parse_object({"reward": config})).reward
    assert callable(source.load)


def test_unknown_names():
    known = ", ".join(f"`{name}`" for name in OWN)
    assert refused("imagereward").endswith(f"got `imagereward`; known are {known}")
    with pytest.raises(ConfigError, match="known are `aesthetic`"):
        NamedReward(name="imagereward")


def test_unknown_settings_and_values():
    assert "Option 'size' is not accepted; it takes `model`, `head`" in refused("aesthetic", size=1)
    assert 'key "crop"' in refused("aesthetic", crop="big")
    assert "`omega` in [0, 1]; got 7" in refused("denscore", omega=7.0)
    with pytest.raises(ConfigError, match="not accepted"):
        NamedReward(name="aesthetic", settings={"size": 1})


def test_packages_that_are_broken(package):
    assert "`denscore`; got my_rewards:Brightness, segalign.rewards.zoo:" in refused("denscore")
    assert "`gone` in `my_rewards:Gone`; got: module 'my_rewards' has no" in refused("gone")
    assert "got: No module named 'my_lost_rewards'; install" in refused("lost")
    assert "to have `load()`; `int` has none" in refused("nothing")
