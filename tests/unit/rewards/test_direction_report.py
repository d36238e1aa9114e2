"""Numbers and picture of a direction's report, on scores that are known."""

import csv
import io

import pytest
import torch
from PIL import Image

from segalign.errors import DataError
from segalign.rewards.common_direction import CorpusDirection, Provenance
from segalign.rewards.direction_picture import draw_report
from segalign.rewards.direction_report import (
    PairFeatures,
    matrix_numbers,
    report_page,
    scores_table,
    shares_csv,
    take_apart,
)

E, N = 32, 24
FACTS = Provenance(
    model="tiny", model_digest="a", text="whole", captions_digest="b", num_captions=600
)


@pytest.fixture
def report():
    """Captions in a cone; images along their caption's own part, with offsets along V."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.eye(E, dtype=torch.float64)[0]
    own = torch.zeros(N, E, dtype=torch.float64)
    own[:, 1 : N + 1] = torch.eye(N, dtype=torch.float64)
    text = 0.8 * direction + 0.6 * own
    offsets = torch.rand(N, 1, generator=generator, dtype=torch.float64)
    image = 0.2 * own + offsets * direction
    pairs = PairFeatures(
        sample_ids=list(range(5, 5 + N)), text=text, image=image, set_aside={"image_missing": 2}
    )
    return take_apart(pairs, CorpusDirection(direction, FACTS))


def test_numbers_of_a_matrix():
    scores = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.5]])
    numbers = matrix_numbers(scores)
    assert numbers.diagonal == pytest.approx(1.5)
    assert numbers.off_diagonal == pytest.approx(2 / 6)
    assert numbers.text_to_image == pytest.approx(2 / 3)
    assert numbers.image_to_text == pytest.approx(2 / 3)


def test_a_tie_is_lost():
    assert matrix_numbers(torch.ones(3, 3)).text_to_image == 0


def test_the_parts_sum_to_the_score_and_tell_pairs_apart(report):
    parts = report.parts
    torch.testing.assert_close(parts["relevant"] + parts["irrelevant"], parts["plain"])
    assert report.shares.tolist() == pytest.approx([0.8] * N)
    torch.testing.assert_close(
        parts["relevant"], 0.12 * torch.eye(N, dtype=torch.float64), atol=1e-7, rtol=0
    )
    assert matrix_numbers(parts["relevant"]).text_to_image == 1
    assert matrix_numbers(parts["plain"]).text_to_image < 0.5
    assert matrix_numbers(parts["irrelevant"]).text_to_image <= 1 / N


def test_a_direction_of_another_width_is_refused(report):
    pairs = PairFeatures(
        sample_ids=[0, 1], text=torch.eye(2, 7), image=torch.eye(2, 7), set_aside={}
    )
    with pytest.raises(DataError, match="common direction of width 7, the model's; got 32"):
        take_apart(pairs, CorpusDirection(torch.eye(E)[0], FACTS))


def test_the_page_and_the_table_state_the_numbers(report):
    page = report_page(report, direction_file="v.safetensors", shards="shards")
    assert scores_table(report) in page
    assert "| text-relevant part   | +0.1200 | +0.0000 | 1.000 " in page
    assert "set aside: image_missing: 2" in page
    assert "mean 0.8000, std 0.0000, 5 % 0.8000, 95 % 0.8000" in page
    assert "](direction.png)" in page


def test_every_pair_has_a_line_of_csv(report):
    rows = list(csv.DictReader(io.StringIO(shares_csv(report))))
    assert [int(row["sample"]) for row in rows] == report.sample_ids
    for row in rows:
        parts = float(row["text_relevant"]) + float(row["text_irrelevant"])
        assert float(row["score"]) == pytest.approx(parts, abs=2e-6)
        assert float(row["common_share"]) == pytest.approx(0.8)


def test_the_picture_is_one_of_four_panels(report):
    drawn = draw_report(report, num_shown=4)
    assert draw_report(report, num_shown=5) != drawn
    with Image.open(io.BytesIO(drawn)) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 800
