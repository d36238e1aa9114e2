"""Captions of which some fail: the others keep their pixels, and the failures are known."""

import logging

import pytest
import torch

from segalign.errors import ConfigError, DataError, NonFiniteError
from segalign.evaluation.attempts import Failure, attempt


class Picky:
    """Paint the id and seed of each row; its place too, as kernels do in the last bits."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error or ValueError("no such word\nand more")
        self.sizes: list[int] = []

    def generate(self, captions, sample_ids, eval_seed, weights="raw"):
        self.sizes.append(len(captions))
        if "bad" in captions:
            raise self.error
        rows = zip(sample_ids, eval_seed, range(len(captions)), strict=True)
        values = torch.tensor([0.1 * i + 0.01 * s + 0.001 * place for i, s, place in rows])
        return (values + 0.3 * (weights == "ema")).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def test_a_micro_batch_that_works_is_made_once():
    generator = Picky()
    images, failures = attempt(generator, ["a", "b"], [1, 2], [3, 4])
    assert failures == []
    assert generator.sizes == [2]
    assert images is not None
    assert images[:, 0, 0, 0].tolist() == pytest.approx([0.13, 0.241])


def test_rows_that_fail_are_nan_and_the_others_are_as_in_a_whole_batch(caplog):
    generator = Picky()
    images, failures = attempt(generator, ["a", "bad", "c"], [1, 2, 3], [4, 5, 6], "ema")
    whole = generator.generate(["a", "b", "c"], [1, 2, 3], [4, 5, 6], "ema")
    assert failures == [Failure(row=1, error="ValueError", message="no such word")]
    assert images is not None
    # The place is the same, too, and the shape of every batch.
    assert torch.equal(images[[0, 2]], whole[[0, 2]])
    assert images[1].isnan().all()
    assert set(generator.sizes) == {3}
    assert caplog.messages == [
        "3 images could not be made (ValueError: no such word); they are made one at a time"
    ]


def test_a_micro_batch_of_which_nothing_works_has_no_images():
    images, failures = attempt(Picky(RuntimeError()), ["bad", "bad"], [1, 2], [0, 0])
    assert images is None
    assert failures == [Failure(0, "RuntimeError", ""), Failure(1, "RuntimeError", "")]


class Broken(Picky):
    """Fails with every caption, in the same words."""

    def generate(self, captions, sample_ids, eval_seed, weights="raw"):
        raise ValueError("no `eat`\nand more")


class Echoing(Picky):
    """Fails with every caption, in words of its own."""

    def generate(self, captions, sample_ids, eval_seed, weights="raw"):
        raise ValueError(f"cannot make `{captions[0]}`")


def test_what_all_of_the_first_micro_batch_fail_with_is_a_setting():
    bad = Broken()
    batch = (["a", "b"], [1, 2], [0, 0])
    with pytest.raises(ConfigError, match=r"all 2 .* ValueError: no `eat`; correct") as raised:
        attempt(bad, *batch, is_first=True)
    assert "\n" not in str(raised.value)
    # Later, or with one caption, or in other words, it may be the captions.
    assert len(attempt(bad, *batch)[1]) == 2
    assert len(attempt(bad, ["a", "a"], [1, 1], [0, 1], is_first=True)[1]) == 2
    assert len(attempt(Echoing(), *batch, is_first=True)[1]) == 2


def test_a_row_that_works_shows_that_settings_do():
    images, failures = attempt(Picky(), ["bad", "a", "bad"], [1, 2, 3], [0] * 3, is_first=True)
    assert images is not None
    assert [failure.row for failure in failures] == [0, 2]


def test_long_messages_are_cut():
    _, failures = attempt(Picky(KeyError("x" * 999)), ["bad"], [1], [0])
    assert len(failures[0].message) == 200


def test_a_sharded_model_is_asked_once(caplog):
    caplog.set_level(logging.WARNING)
    generator = Picky()
    with pytest.raises(ValueError, match="no such word"):
        attempt(generator, ["a", "bad"], [1, 2], [3, 4], can_retry=False)
    assert generator.sizes == [2]
    assert caplog.messages == []


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), SystemExit(3), ConfigError("x"),
     torch.AcceleratorError("the device is lost", 1)],
)  # fmt: skip
def test_what_every_caption_would_meet_is_raised(error):
    generator = Picky(error)
    with pytest.raises(type(error)) as raised:
        attempt(generator, ["a", "bad"], [1, 2], [3, 4])
    assert raised.value is error
    assert generator.sizes == [2]


@pytest.mark.parametrize("error", [DataError("x"), NonFiniteError("x")])
def test_errors_that_are_of_one_caption_are_borne(error):
    images, failures = attempt(Picky(error), ["a", "bad"], [1, 2], [3, 4])
    assert failures == [Failure(1, type(error).__name__, "x")]
    assert images is not None
    assert images[0].isfinite().all()


class Loud(Picky):
    """Leaves [0, 1] for some captions."""

    def generate(self, captions, sample_ids, eval_seed, weights="raw"):
        images = super().generate(captions, sample_ids, eval_seed, weights).clone()
        for row, caption in enumerate(captions):
            images[row, 0, 0, 0] += {"loud": 2.0, "lost": torch.nan}.get(caption, 0.0)
        return images


@pytest.mark.parametrize("others", [["a", "b"], ["a", "bad"]])
def test_an_image_that_leaves_its_range_has_failed(others):
    images, failures = attempt(Loud(), ["loud", *others, "lost"], [1, 2, 3, 4], [0] * 4)
    assert [failure.row for failure in failures] == [0, 2][: 1 + ("bad" in others)]
    assert failures[0].error == "DataError"
    assert "expected images in [0, 1] from the model; got 0.1 to 2.1" in failures[0].message
    assert images is not None
    assert images[0].isnan().all()
    assert images[1].isfinite().all()
    # Not finite is another matter, which is counted elsewhere.
    assert images[3].isnan().sum() == 1


def test_no_image_is_left_where_all_leave_their_range():
    images, failures = attempt(Loud(), ["loud", "loud"], [1, 2], [0, 0])
    assert images is None
    assert [failure.row for failure in failures] == [0, 1]


def test_what_is_no_image_has_failed():
    class Wrong(Picky):
        def generate(self, captions, sample_ids, eval_seed, weights="raw"):
            return torch.zeros(len(captions), 3, 2, 2, dtype=torch.uint8)

    images, failures = attempt(Wrong(), ["a"], [1], [3])
    assert images is None
    assert "expected float images" in failures[0].message


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory.\nTried"), MemoryError(),
     RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")],
)  # fmt: skip
@pytest.mark.parametrize("can_retry", [True, False])
def test_memory_that_runs_out_is_one_line(error, can_retry):
    with pytest.raises(
        ConfigError, match=r"2 images at a time .* Lower the evaluation's"
    ) as raised:
        attempt(Picky(error), ["a", "bad"], [1, 2], [3, 4], can_retry=can_retry)
    assert "\n" not in str(raised.value)


def test_memory_may_run_out_at_a_single_row():
    class Full(Picky):
        def generate(self, captions, sample_ids, eval_seed, weights="raw"):
            if set(captions) == {"huge"}:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().generate(captions, sample_ids, eval_seed, weights)

    with pytest.raises(ConfigError, match="Lower the evaluation's"):
        attempt(Full(), ["bad", "huge"], [1, 2], [3, 4])
