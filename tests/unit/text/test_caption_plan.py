import random
from fractions import Fraction

import pytest

from segalign.text.caption_plan import plan_caption, share_budget
from segalign.text.clip_tower import ClipTower
from segalign.text.segmenter import Segment
from segalign.text.special_tokens import SpecialTokenPolicy
from segalign.text.tokenizer import clip_tokenizer


@pytest.mark.parametrize(
    ("counts", "token_budget", "cut", "proportional"),
    [
        ([10, 20, 30], 60, [10, 20, 30], [10, 20, 30]),
        ([10, 20, 30], 99, [10, 20, 30], [10, 20, 30]),
        ([10, 20, 30], 30, [10, 20, 0], [5, 10, 15]),
        # 9.33, 9.33, 9.33: the remainder goes to the first
        ([10, 10, 10], 28, [10, 10, 8], [10, 9, 9]),
        # 2.8, 0.7, 9.1, 8.4: 0.7 becomes one, the other 20 are shared as 2.76, 8.97, 8.28
        ([4, 1, 13, 12], 21, [4, 1, 13, 3], [3, 1, 9, 8]),
        # 0.1, 0.1, 9.8: one each, the rest to the long one
        ([1, 1, 98], 10, [1, 1, 8], [1, 1, 8]),
        ([98, 1, 1], 10, [10, 0, 0], [8, 1, 1]),
        ([50, 50], 2, [2, 0], [1, 1]),
        # fewer tokens than segments: no shares
        ([50, 50], 1, [1, 0], [1, 0]),
        ([2, 2, 2, 2], 3, [2, 1, 0, 0], [2, 1, 0, 0]),
        ([500], 7, [7], [7]),
    ],
)
def test_shares(counts, token_budget, cut, proportional):
    assert share_budget(counts, token_budget, "cut") == cut
    assert share_budget(counts, token_budget, "proportional") == proportional


def largest_remainders(counts, token_budget):
    """Share a budget in rational numbers; raise shares below one to one, until none is."""
    single = set()
    while True:
        rest = [i for i in range(len(counts)) if i not in single]
        scale = Fraction(token_budget - len(single), sum(counts[i] for i in rest))
        too_small = {i for i in rest if counts[i] * scale < 1}
        if not too_small:
            break
        single |= too_small
    shares = dict.fromkeys(single, 1) | {i: int(counts[i] * scale) for i in rest}
    rest.sort(key=lambda i: shares[i] - counts[i] * scale)  # stable: the first of equal ones
    for i in rest[: token_budget - sum(shares.values())]:
        shares[i] += 1
    return [shares[i] for i in range(len(counts))]


@pytest.mark.parametrize("seed", range(20))
def test_proportional_shares_are_largest_remainders(seed):
    draw = random.Random(seed)
    for _ in range(50):
        counts = [draw.choice((1, 2, 5, 20, 76)) for _ in range(draw.randint(1, 12))]
        token_budget = draw.randint(len(counts), sum(counts))
        shares = share_budget(counts, token_budget, "proportional")
        assert shares == largest_remainders(counts, token_budget)
        assert sum(shares) == token_budget
        assert all(1 <= share <= count for share, count in zip(shares, counts, strict=True))


@pytest.mark.parametrize("over_budget", ["cut", "proportional"])
def test_no_budget_is_wasted_and_none_exceeded(over_budget):
    draw = random.Random(0)
    for _ in range(500):
        counts = [draw.randint(1, 30) for _ in range(draw.randint(1, 9))]
        token_budget = draw.randint(1, 200)
        shares = share_budget(counts, token_budget, over_budget)
        assert sum(shares) == min(token_budget, sum(counts))
        assert all(0 <= share <= count for share, count in zip(shares, counts, strict=True))


@pytest.fixture
def tower(text_model, tokenizer):
    return ClipTower(text_model, tokenizer)


def plan(tower, texts, token_budget, *, policy=None, **settings):
    return plan_caption(
        [Segment(text, 0, len(text)) for text in texts],
        tower,
        policy=policy or SpecialTokenPolicy(),
        token_budget=token_budget,
        **{"long_segments": "cut_further", **settings},
    )


def kept_words(tower, found):
    return [[s.input_ids[p] for p in s.positions] for s in found.tokens]


def test_proportional_keeps_the_first_tokens_of_each_segment(tower):
    texts = ["a red cat", "a b c d e f g"]  # 4 and 8 tokens with their start
    found = plan(tower, texts, 6, over_budget="proportional")
    first, second = (tower.wrap(tower.word_ids(text)) for text in texts)
    assert kept_words(tower, found) == [list(first[:2]), list(second[:4])]
    assert found.num_dropped == 6


@pytest.mark.parametrize("over_budget", ["cut", "proportional"])
@pytest.mark.parametrize("token_budget", [1, 2, 3, 7, 50])
def test_a_budget_smaller_than_one_segment(tower, over_budget, token_budget):
    found = plan(tower, ["one " * 60], token_budget, over_budget=over_budget)
    ids = tower.wrap(tower.word_ids("one " * 60))
    assert kept_words(tower, found) == [list(ids[:token_budget])]
    assert found.num_dropped == 61 - token_budget


def test_segments_behind_the_budget_are_only_counted(tower):
    found = plan(tower, ["a cat", "a dog", "a fox"], 4)
    assert [len(s.positions) for s in found.tokens] == [3, 1]
    assert found.num_segments == 3
    assert found.num_dropped == 5


def test_lost_and_dropped_tokens_add_up(tower):
    settings = {"long_segments": "truncate", "over_budget": "proportional"}
    found = plan(tower, ["one " * 100, "two " * 9], 40, **settings)
    assert sum(len(s.positions) for s in found.tokens) == 40
    assert found.num_dropped == 101 + 10 - 40
    assert found.num_cut == 1


@pytest.fixture
def padding_with_a(text_model):
    """Build a tower whose padding is the word "a"."""
    tower = ClipTower(text_model, clip_tokenizer(pad_token="a</w>"))
    assert tower.word_ids("a cat a")[::2] == (tower.pad_token_id,) * 2
    return tower


def test_words_that_the_policy_drops_do_not_count_as_lost(padding_with_a):
    tower = padding_with_a
    policy = SpecialTokenPolicy(drop_pad_words=True, start="first")
    text = "a red " * 60  # every second of 120 words is dropped
    found = plan(tower, [text, "a a a", "a cat"], 30, policy=policy, long_segments="truncate")
    assert found.num_segments == 3
    assert [len(s.positions) for s in found.tokens] == [30]
    assert found.num_dropped == 1 + 60 + 0 + 1 - 30
    roomy = plan(tower, [text, "a a a", "a cat"], 99, policy=policy, long_segments="truncate")
    assert [len(s.positions) for s in roomy.tokens] == [1 + 37, 1]
    assert roomy.num_dropped == 60 - 37


def test_segments_that_keep_nothing_take_no_place(padding_with_a):
    tower = padding_with_a
    policy = SpecialTokenPolicy(drop_pad_words=True, start="first")
    for over_budget in ("cut", "proportional"):
        found = plan(tower, ["cat", "a a", "a", "dog"], 3, policy=policy, over_budget=over_budget)
        assert [len(s.positions) for s in found.tokens] == [2, 1]
        assert (found.num_segments, found.num_dropped) == (4, 0)


def test_a_huge_segment_is_judged_by_its_start(tower):
    seen = []
    count = tower.count_word_tokens
    tower.count_word_tokens = lambda text: seen.append(len(text)) or count(text)
    found = plan(tower, ["red apples " * 2_000], 20)
    assert max(seen) <= 4096
    assert found.num_cut == 1
    assert found.num_dropped == 4_000 + found.num_segments - 20


def test_a_huge_segment_that_fits_is_not_cut(tower):
    found = plan(tower, ["a cat" + " " * 10_000 + "sleeps"], 20)
    assert (found.num_cut, found.num_segments) == (0, 1)
