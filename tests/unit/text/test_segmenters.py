import json

import pytest

from segalign.errors import ConfigError
from segalign.text.clauses import ClauseSegmenter
from segalign.text.segmenter import OfficialSegmenter, SentenceSegmenter
from segalign.text.segmenters import build_segmenter, describe_segmenter
from segalign.text.windows import WindowSegmenter

CAPTION = "A red, an old and a fat cat; e.g. a tabby, 3.5 kg. " * 12


@pytest.mark.parametrize(
    ("segmenter", "description"),
    [
        (SentenceSegmenter(), {"name": "sentence"}),
        (OfficialSegmenter(), {"name": "official"}),
        (ClauseSegmenter(), {"name": "clause", "min_words": 3}),
        (ClauseSegmenter(min_words=5), {"name": "clause", "min_words": 5}),
        (WindowSegmenter(), {"name": "window", "num_tokens": 75}),
        (WindowSegmenter(num_tokens=20), {"name": "window", "num_tokens": 20}),
    ],
)
def test_a_description_builds_the_same_strategy(segmenter, description):
    assert describe_segmenter(segmenter) == description
    rebuilt = build_segmenter(json.loads(json.dumps(description)))
    assert type(rebuilt) is type(segmenter)
    assert rebuilt.split(CAPTION) == segmenter.split(CAPTION)
    assert describe_segmenter(rebuilt) == description


def test_settings_have_defaults():
    assert describe_segmenter(build_segmenter({"name": "window"}))["num_tokens"] == 75


def test_building_leaves_the_description_alone():
    description = {"name": "clause", "min_words": 2}
    build_segmenter(description)
    assert description == {"name": "clause", "min_words": 2}


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"name": "sentences"}, "one of `sentence`, `official`, `clause`, `window`; got 'sent"),
        ({}, "one of `sentence`, `official`, `clause`, `window`; got None"),
        ({"name": ["clause"]}, r"`window`; got \['clause'\]"),
        ("clause", "described as .* got 'clause'; known names: `sentence`"),
        (None, "described as .* got None"),
        ({"name": "sentence", "min_words": 3}, "`sentence` takes no settings; got 'min_words'"),
        ({"name": "clause", "words": 3}, "`clause` takes only `min_words`; got 'words'"),
        ({"name": "window", "tokenizer": None}, "`window` takes only `num_tokens`; got 'tok"),
        ({"name": "window", "num_tokens": 0}, "`num_tokens` must be an integer of at least 1"),
        ({"name": "clause", "min_words": "3"}, "`min_words` must be an integer of at least 1"),
    ],
)
def test_refuses_what_it_cannot_build(description, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_segmenter(description)
    assert "\n" not in str(caught.value)


class Own(SentenceSegmenter):
    pass


@pytest.mark.parametrize("segmenter", [Own(), object(), None])
def test_refuses_to_describe_foreign_classes(segmenter):
    with pytest.raises(ConfigError, match="`clause`, `window`; got an object of class `") as caught:
        describe_segmenter(segmenter)
    assert "\n" not in str(caught.value)


def test_refuses_to_describe_an_own_tokenizer(tokenizer):
    with pytest.raises(ConfigError, match="must count with CLIP's own tokenizer"):
        describe_segmenter(WindowSegmenter(75, tokenizer))
