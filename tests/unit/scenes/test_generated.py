"""Scenes that the tiny base draws: the same every time, and described by what they show."""

import json
import tarfile

import numpy as np
import pytest
import torch

import main
from segalign.errors import ConfigError
from segalign.scenes.generated import BLOCK_SIZE, GeneratedSceneSource, block_sampler
from segalign.scenes.oracle import read_scenes
from segalign.scenes.samples import make_sample
from segalign.scenes.world import get_world

SHARE = 0.05
START = BLOCK_SIZE  # the second block of the stream


@pytest.fixture(scope="module")
def source():
    return GeneratedSceneSource(BLOCK_SIZE, seed=3, start=START, share=SHARE)


@pytest.fixture(scope="module")
def drawn(source):
    samples = {index: source.sample(index) for index in range(BLOCK_SIZE)}
    return {index: sample for index, sample in samples.items() if "drawn" in sample.metadata}


def test_captions_state_what_the_oracle_reads(drawn):
    assert drawn
    for sample in drawn.values():
        image = torch.from_numpy(sample.image.copy()).permute(2, 0, 1)[None].float() / 255
        (scene,) = read_scenes(image, get_world("3x3")).scenes
        stated = sample.metadata["scene"]
        assert stated["background"] == scene.background
        cells = [None if cell is None else vars(cell) for cell in scene.cells]
        assert [cell and dict(cell) for cell in stated["cells"]] == cells
        for kind, cell, value, start, end in sample.metadata["facts"]:
            assert value in sample.caption[start:end]
            if kind in ("shape", "colour", "size"):
                assert cells[cell][kind] == value


def test_a_drawn_picture_is_not_the_rendered_one(drawn):
    for index, sample in drawn.items():
        rendered = make_sample("3x3", 3, START + index, length="short")
        assert sample.image.shape == rendered.image.shape
        assert sample.image.dtype == np.uint8
        assert sample.metadata["drawn"]["distance"] > 0.01


def test_the_others_are_rendered(source, drawn):
    index = next(index for index in range(BLOCK_SIZE) if index not in drawn)
    sample = source.sample(index)
    rendered = make_sample("3x3", 3, START + index, length="short")
    assert np.array_equal(sample.image, rendered.image)
    assert (sample.caption, sample.metadata) == (rendered.caption, rendered.metadata)


def test_a_sample_depends_on_its_place_in_the_stream_alone(source, drawn):
    index = max(drawn)
    later = GeneratedSceneSource(1, seed=3, start=START + index, share=SHARE)
    assert later.members(0) == source.members(index)
    assert later.origin(0) == source.origin(index) == f"scene {START + index}"
    other = GeneratedSceneSource(1, seed=4, start=START + index, share=0)
    assert other.members(0) != source.members(index)


def test_every_setting_is_part_of_the_settings():
    def settings(count=2, **others):
        return GeneratedSceneSource(count, **others).settings()

    changed = [{"count": 3}, {"seed": 1}, {"start": 1}, {"share": 0.1}, {"length": "long"}]
    everything = [settings(), *(settings(**one) for one in changed)]
    assert all(one not in everything[:number] for number, one in enumerate(everything))
    assert settings() == settings()


def test_steps_and_guidance_vary_by_block():
    samplers = [block_sampler(0, block) for block in range(200)]
    assert {sampler.num_inference_steps for sampler in samplers} == set(range(4, 11))
    guidance = [sampler.guidance_scale for sampler in samplers]
    assert 1 <= min(guidance) < 1.3
    assert 3.7 < max(guidance) < 4


@pytest.mark.parametrize(("count", "share"), [(0, 0.5), (1, -0.1), (1, 1.1)])
def test_settings_that_cannot_work(count, share):
    with pytest.raises(ConfigError, match="a share in"):
        GeneratedSceneSource(count, share=share)


def test_they_are_packed(tmp_path, capsys):
    size = ["--count", "3", "--share", "0", "--seed", "5", "--start", "7", "--length", "long"]
    assert main.main(["shards", "pack", "generated-scenes", str(tmp_path / "out"), *size]) == 0
    assert "num packed  3" in capsys.readouterr().out
    with tarfile.open(next((tmp_path / "out").glob("*.tar"))) as shard:
        members = {name.rpartition(".")[2]: shard.extractfile(name) for name in shard.getnames()}
        assert json.load(members["json"])["caption"] == make_sample("3x3", 5, 9).caption
