"""The embedded benchmark: determinism, length classes, oracle, accuracy by position."""

import json

import numpy as np
import pytest
import torch

from segalign.errors import ConfigError
from segalign.scenes.accuracy import FactRecord, accuracies, count_facts, token_bucket
from segalign.scenes.evaluation import SceneScore, score_generator
from segalign.scenes.grammar import num_caption_tokens
from segalign.scenes.oracle import read_scenes
from segalign.scenes.questions import (
    answer_logits,
    draw_question_bank,
    edit_caption,
    question_answers,
)
from segalign.scenes.samples import make_sample
from segalign.scenes.world import Scene, SceneObject, get_world
from segalign.text.tokenizer import clip_tokenizer, word_token_ids

WORLDS = ("3x3", "2x2")


def images_of(samples):
    return torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("world", WORLDS)
def test_a_sample_is_a_function_of_its_arguments(world):
    one, two = make_sample(world, 3, 7), make_sample(world, 3, 7)
    assert one.caption == two.caption
    assert (one.image == two.image).all()
    assert one.metadata == json.loads(json.dumps(one.metadata)) | {
        "scene": one.metadata["scene"]  # tuples become lists
    }
    other = make_sample(world, 4, 7)
    assert one.caption != other.caption


def test_the_picture_does_not_depend_on_the_caption_length():
    short, long = (make_sample("3x3", 0, 5, length=length) for length in ("short", "very_long"))
    assert (short.image == long.image).all()
    assert short.metadata["scene"] == long.metadata["scene"]


@pytest.mark.parametrize("world", WORLDS)
def test_length_classes(world):
    def tokens(length):
        captions = [make_sample(world, 0, i, length=length).caption for i in range(200)]
        return np.array([num_caption_tokens(caption) for caption in captions])

    assert tokens("short").max() <= 75
    assert tokens("very_long").min() >= 360
    assert tokens("very_long").max() <= 690
    assert np.median(tokens("long")) > 77


def test_words_are_single_tokens_of_the_real_vocabulary():
    tokenizer = clip_tokenizer()
    for index in range(60):
        caption = make_sample("3x3", 1, index, length="very_long").caption
        assert len(word_token_ids(caption, tokenizer)) == num_caption_tokens(caption)


def test_an_unknown_world_is_named():
    with pytest.raises(ConfigError, match=r"among `3x3`, `2x2`; got `9x9`\. Choose one of them\."):
        get_world("9x9")


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("noise", "least"), [(0.0, 1.0), (0.25, 0.99)])
def test_the_oracle_reads_its_own_renders(world, noise, least):
    samples = [make_sample(world, 0, index) for index in range(60)]
    clean = images_of(samples)
    generator = torch.Generator().manual_seed(0)
    images = clean + noise * torch.randn(clean.shape, generator=generator)
    score = SceneScore(get_world(world), clip_tokenizer())
    score.update(images, [s.caption for s in samples], [s.metadata for s in samples])
    assert min(score.accuracies().values()) >= least - 0.02 * (noise > 0)
    assert score.accuracies()["attributes"] >= least
    assert score.chance_accuracies()["attributes"] < 0.36


def test_the_oracle_refuses_images_of_another_world():
    with pytest.raises(ValueError, match=r"expected images \(B, 3, 36, 36\); got \(1, 3, 24, 24\)"):
        read_scenes(torch.zeros(1, 3, 24, 24), get_world("3x3"))


def test_facts_span_the_sentence_that_states_them():
    sample = make_sample("3x3", 0, 2)
    for kind, _, value, start, end in sample.metadata["facts"]:
        sentence = sample.caption[start:end]
        assert sentence.endswith(".")
        assert sentence[0].isupper()
        assert value in sentence, (kind, sentence)


@pytest.mark.parametrize(
    ("first", "last", "bucket"),
    [
        (1, 30, "within_32"),
        (20, 31, "within_77"),
        (60, 75, "within_77"),
        (70, 76, None),
        (75, 90, None),
        (76, 90, "past_77"),
    ],
)
def test_token_buckets(first, last, bucket):
    assert token_bucket(FactRecord("shape", 0, "circle", first, last)) == bucket


def test_counting_facts_by_hand():
    scene = Scene("white", (SceneObject("circle", "red", "small"), None, None, None))
    facts = [
        FactRecord("shape", 0, "circle", 1, 9),
        FactRecord("colour", 0, "red", 1, 9),
        FactRecord("size", 0, "large", 80, 90),
        FactRecord("occupancy", 1, "empty", 1, 9),
        FactRecord("shape", 2, "cross", 40, 50),
        FactRecord("background", -1, "black", 1, 9),
    ]
    result = accuracies(count_facts(facts, scene))
    assert result == {
        "attributes": 0.5,
        "attributes/past_77": 0.0,
        "attributes/within_32": 1.0,
        "attributes/within_77": 2 / 3,
        "background": 0.0,
        "colour": 1.0,
        "objects": 0.0,
        "occupancy": 1.0,
        "shape": 0.5,
        "size": 0.0,
    }


def test_counts_survive_the_way_through_a_tensor():
    samples = [make_sample("2x2", 0, index) for index in range(4)]
    rows = {s.caption: image for s, image in zip(samples, images_of(samples), strict=True)}

    def generate(captions, sample_ids):
        return torch.stack([rows[caption] for caption in captions])

    score = score_generator(generate, samples, clip_tokenizer(), batch_size=3)
    twin = SceneScore(score.world, score.tokenizer)
    twin.load_tensor(score.to_tensor() * 2)
    assert twin.accuracies() == score.accuracies()
    assert twin.counts["attributes", "all"] == 2 * score.counts["attributes", "all"]


def test_questions_are_answered_by_the_scene():
    world = get_world("2x2")
    sample = make_sample("2x2", 0, 0)
    from random import Random

    bank = draw_question_bank(world, Random(0))
    answers = question_answers([sample.metadata, {}], world)
    assert answers.shape == (2, len(bank.kinds)) == (2, 13)
    assert (answers[1] == -1).all()
    for question, answer in enumerate(answers[0].tolist()):
        segment = bank.segments[bank.table[question, answer]]
        cell = question // 3
        scene = sample.metadata["scene"]
        stated = (
            scene["background"] if question == 12 else scene["cells"][cell][bank.kinds[question]]
        )
        assert stated in segment
        if question < 12:
            assert world.places[cell] in segment
    logits = answer_logits(torch.zeros(2, len(bank.segments)), bank.table)
    assert logits.shape == (2, 13, 6)
    assert torch.isinf(logits).sum() == 2 * (bank.table < 0).sum()


def test_an_edited_caption_differs_in_one_word():
    from random import Random

    sample = make_sample("3x3", 0, 3)
    edited = edit_caption(sample.caption, sample.metadata["facts"], Random(1))
    pairs = zip(sample.caption.split(), edited.split(), strict=True)
    assert sum(ours != theirs for ours, theirs in pairs) == 1
    assert edit_caption("Nothing.", [], Random(1)) == "Nothing."
