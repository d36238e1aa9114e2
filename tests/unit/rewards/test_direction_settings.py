"""Estimates of the common direction as configs name them."""

import pytest
import torch
from jsonargparse import ArgumentParser

from segalign.errors import ConfigError, DataError
from segalign.rewards.common_direction import (
    BatchDirection,
    CorpusDirection,
    EmaDirection,
    Provenance,
)
from segalign.rewards.direction_checks import text_digest
from segalign.rewards.direction_settings import (
    BatchEstimate,
    CorpusEstimate,
    DirectionSource,
    EmaEstimate,
)


class ToyScorer(torch.nn.Module):
    """What a digest is taken of."""

    def __init__(self):
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        torch.manual_seed(0)
        small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        self.tower = torch.nn.Module()
        self.tower.text_model = CLIPTextModel(CLIPTextConfig(**small, num_attention_heads=2))
        self.model = torch.nn.Module()
        self.model.text_projection = torch.nn.Linear(8, 4)
        self.segmenter = None


@pytest.fixture(scope="module")
def scorer():
    return ToyScorer()


def save_direction(path, **facts):
    known = {
        "model": "toy",
        "model_digest": "a",
        "text": "whole",
        "captions_digest": "b",
        "num_captions": 600,
    }
    CorpusDirection(torch.eye(4)[0], Provenance(**{**known, **facts})).save(path)
    return str(path)


def build_from_config(name, **init_args):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--direction", type=DirectionSource)
    path = f"segalign.rewards.direction_settings.{name}"
    config = {"direction": {"class_path": path, "init_args": init_args}}
    return parser.instantiate(parser.parse_object(config)).direction


@pytest.mark.parametrize(
    ("name", "init_args", "expected"),
    [
        ("CorpusEstimate", {"file": "v.safetensors"}, CorpusEstimate(file="v.safetensors")),
        ("EmaEstimate", {"decay": 0.5}, EmaEstimate(decay=0.5)),
        ("EmaEstimate", {}, EmaEstimate(decay=0.99)),
        ("BatchEstimate", {}, BatchEstimate()),
    ],
)
def test_configs_can_name_them(name, init_args, expected):
    assert build_from_config(name, **init_args) == expected


def test_a_corpus_is_read_and_checked_when_it_is_built(tmp_path, scorer):
    path = save_direction(tmp_path / "v.safetensors", model_digest=text_digest(scorer))
    built = CorpusEstimate(file=path).build(scorer, num_captions=1)
    assert isinstance(built, CorpusDirection)
    assert torch.equal(built.direction, torch.eye(4)[0])


def test_a_corpus_of_another_model_or_use_is_refused(tmp_path, scorer):
    path = save_direction(tmp_path / "v.safetensors")
    with pytest.raises(DataError, match="of this model's text weights"):
        CorpusEstimate(file=path).build(scorer, num_captions=64)
    digest, text = text_digest(scorer), 'segments {"name": "sentence"}'
    path = save_direction(tmp_path / "w.safetensors", model_digest=digest, text=text)
    with pytest.raises(DataError, match="as they are scored"):
        CorpusEstimate(file=path).build(scorer, num_captions=64)
    with pytest.raises(ConfigError, match="there is no such file"):
        CorpusEstimate(file=str(tmp_path / "nowhere")).build(scorer, num_captions=64)


def test_a_moving_average_checks_its_decay_at_once(scorer):
    built = EmaEstimate(decay=0.5).build(scorer, num_captions=1)
    assert isinstance(built, EmaDirection)
    assert built.decay == 0.5
    with pytest.raises(ConfigError, match="expected `decay`"):
        EmaEstimate(decay=1.5)


def test_a_batch_of_one_is_refused_when_it_is_built(scorer):
    assert isinstance(BatchEstimate().build(scorer, num_captions=64), BatchDirection)
    with pytest.raises(ConfigError, match="at least 2 captions"):
        BatchEstimate().build(scorer, num_captions=1)
