"""What the page says about a prompt agrees with what the encoder does."""

import pytest
import torch

from segalign.generation.segment_marks import mark_prompt
from segalign.scenes.base import ScenesBase
from segalign.text.segmenter import Segment
from segalign.text.settings import TextEncoding
from segalign.text.text_models import TextModels

LONG = "A fox, " + "very " * 100 + "red. "
PROMPTS = ["A fox. It is red!", "", " \n", "...", LONG + "It sits. " * 9, "One. " + LONG]


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    bundle = ScenesBase(world="2x2", generator="random", text_model="random").load()
    assert isinstance(bundle.text_models, TextModels)
    return bundle.text_models


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    "settings",
    [
        {"token_budget": 20},
        {"token_budget": 400},
        {"token_budget": 20, "over_budget": "proportional"},
        {"token_budget": 60, "long_segments": "truncate"},
    ],
)
def test_marks_agree_with_the_report(models, settings, prompt):
    # With a start token at the first segment alone, every other kept token is a word.
    policy = {"start": "first", "end": "drop"}
    text = TextEncoding(**settings)
    encoder = text.build(models)
    encoder.policy = type(encoder.policy)(**policy)
    marks = mark_prompt(encoder, prompt)
    report = encoder([prompt]).report
    assert "".join(mark.text for mark in marks) == prompt
    assert sum(mark.num_dropped for mark in marks) == report.dropped_tokens[0]
    assert sum(m.num_tokens - m.num_dropped for m in marks) == report.kept_tokens[0] - 1
    assert max(sum(mark.num_tokens > 0 for mark in marks), 1) == report.num_segments[0]


def test_cut_segments_go_on(models):
    marks = mark_prompt(TextEncoding(token_budget=400).build(models), "One. " + LONG)
    assert [mark.goes_on for mark in marks] == [False, False, True]
    assert {mark.num_dropped for mark in marks} == {0}


def test_an_encoder_that_does_not_split_gives_one_piece(models):
    encoder = TextEncoding(kind="truncated").build(models)
    [mark] = mark_prompt(encoder, LONG)
    assert mark.text == LONG
    assert mark.num_dropped == encoder([LONG]).report.dropped_tokens[0] > 0


class Blanks:
    """A segmenter that makes the blanks between words a segment."""

    def split(self, caption):
        return [Segment("A fox.", 0, 6), Segment("   ", 6, 9), Segment("B.", 9, 11)]


def test_a_segment_without_words_takes_nobodys_tokens(models):
    encoder = TextEncoding(segmenter=Blanks(), token_budget=20).build(models)
    marks = mark_prompt(encoder, "A fox.   B.")
    assert [(mark.num_tokens, mark.num_dropped) for mark in marks] == [(3, 0), (0, 0), (2, 0)]
