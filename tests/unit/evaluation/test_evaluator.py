import random

import numpy as np
import pytest
import torch
from toy_evaluation import Recorder, ToyGenerator, setting_of

from segalign.errors import ConfigError, DataError
from segalign.evaluation.evaluator import Evaluator, image_seed
from segalign.evaluation.pixels import to_pixels
from segalign.evaluation.start_images import StartImages


def evaluate(generator=None, *, start=None, keep=False, **changes):
    recorder = Recorder()
    evaluator = Evaluator(setting_of(**changes), [recorder], start)
    outcome = evaluator.run(generator or ToyGenerator(), keep_as_start=keep)
    return outcome, recorder


def test_a_metric_sees_every_image_once():
    outcome, recorder = evaluate(count=5)
    places = [
        place
        for batch in recorder.batches
        for place, counts in zip(batch.places.tolist(), batch.counted.tolist(), strict=True)
        if counts
    ]
    assert places == [0, 1, 2, 3, 4]
    assert outcome.values == {"seen": 5.0, "non_finite_images": 0.0}
    assert outcome.num_counted == 5
    assert outcome.notes == ["look at this"]


def test_an_image_is_that_of_its_caption_and_seed():
    generator = ToyGenerator()
    _, recorder = evaluate(generator, count=2, images_per_caption=2, batch_size=4)
    (batch,) = recorder.batches
    assert batch.captions == ["caption 0"] * 2 + ["caption 1"] * 2
    ((_, ids, seeds, weights),) = generator.calls
    assert (ids, weights) == ([10, 10, 11, 11], "raw")
    assert seeds == [3, image_seed(3, 1)] * 2
    alone = generator.generate(["caption 1"], [11], [image_seed(3, 1)])
    assert torch.equal(batch.pixels[3:], to_pixels(alone))
    assert not torch.equal(batch.pixels[2], batch.pixels[3])


def test_images_are_rounded_as_files_are():
    images = torch.tensor([0.0, 0.0019, 0.0021, 0.5, 1.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_pixels(images)[0, 0, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize(("value", "named"), [(1.01, "to 1.01"), (-0.2, "got -0.2")])
def test_images_outside_their_range_are_refused(value, named):
    images = torch.full((1, 3, 2, 2), 0.5)
    images[0, 0, 0, 0] = value
    with pytest.raises(DataError, match=rf"expected images in \[0, 1\].*{named}"):
        to_pixels(images)


def test_what_is_no_image_is_refused():
    with pytest.raises(DataError, match=r"expected float images .* got torch.uint8"):
        to_pixels(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))


def test_images_that_are_not_finite_do_not_count():
    outcome, recorder = evaluate(ToyGenerator(bad_captions=["caption 1"]), count=3)
    (batch,) = recorder.batches
    assert batch.counted.tolist() == [True, False, True, False]
    assert batch.pixels[1].eq(0).all()
    assert outcome.values["non_finite_images"] == 1.0
    assert outcome.num_counted == 2


def test_without_a_finite_image_there_are_no_findings():
    bad = [f"caption {number}" for number in range(3)]
    outcome, _ = evaluate(ToyGenerator(bad_captions=bad), count=3)
    assert outcome.values == {"non_finite_images": 3.0}
    assert outcome.findings == {}


class Refusing(ToyGenerator):
    """Cannot make one of the captions."""

    def generate(self, captions, *rest):
        if "caption 2" in captions:
            raise RuntimeError("no such thing\nin this model")
        return super().generate(captions, *rest)


def test_a_caption_that_cannot_be_drawn_is_noted_and_the_others_are_made():
    recorder = Recorder()
    evaluator = Evaluator(setting_of(), [recorder], bears_failures=True)
    outcome = evaluator.run(Refusing())
    (failure,) = outcome.failures
    assert (failure.place, failure.caption) == (2, "caption 2")
    assert failure.error == "RuntimeError: no such thing"
    assert (outcome.num_counted, outcome.num_non_finite) == (4, 0)
    assert recorder.batches[0].counted.tolist() == [True, True, False, True]
    expected = evaluate()[1].batches[0].pixels
    assert torch.equal(recorder.batches[0].pixels[[0, 1, 3]], expected[[0, 1, 3]])


class TooBright(ToyGenerator):
    """Leaves [0, 1] for one of the captions."""

    def generate(self, captions, *rest):
        images = super().generate(captions, *rest)
        images[[caption == "caption 2" for caption in captions]] += 1
        return images


def test_an_image_outside_its_range_is_noted_and_the_others_count():
    recorder = Recorder()
    outcome = Evaluator(setting_of(), [recorder], bears_failures=True).run(TooBright())
    (failure,) = outcome.failures
    assert failure.place == 2
    assert "DataError: expected images in [0, 1]" in failure.error
    assert (outcome.num_counted, outcome.num_non_finite) == (4, 0)
    assert recorder.batches[0].counted.tolist() == [True, True, False, True]
    assert recorder.batches[0].pixels[2].eq(0).all()


def test_a_training_ends_at_an_image_outside_its_range():
    with pytest.raises(DataError, match=r"expected images in \[0, 1\]"):
        evaluate(TooBright())


def test_a_batch_of_which_nothing_can_be_drawn_is_passed_over():
    recorder = Recorder()
    evaluator = Evaluator(setting_of(3, batch_size=1), [recorder], bears_failures=True)
    outcome = evaluator.run(Refusing())
    assert [batch.places.tolist() for batch in recorder.batches] == [[0], [1]]
    assert [failure.place for failure in outcome.failures] == [2]


@pytest.mark.parametrize("first", [0, 2])
def test_a_wrong_setting_ends_a_test_at_once_and_a_late_failure_does_not(first):
    class Broken(ToyGenerator):
        num_calls = 0

        def generate(self, captions, *rest):
            self.num_calls += 1
            if int(captions[0].split()[-1]) >= first:
                raise RuntimeError("no such argument")
            return super().generate(captions, *rest)

    broken = Broken()
    evaluator = Evaluator(setting_of(6, batch_size=2), [Recorder()], bears_failures=True)
    if first == 0:
        with pytest.raises(ConfigError, match="RuntimeError: no such argument"):
            evaluator.run(broken)
        assert broken.num_calls == 3  # once together, and each alone
    else:
        assert [failure.place for failure in evaluator.run(broken).failures] == [2, 3, 4, 5]


def test_a_training_ends_at_what_cannot_be_drawn():
    with pytest.raises(RuntimeError, match="no such thing"):
        evaluate(Refusing())


def test_random_generators_are_left_as_they_were():
    states = []
    for is_evaluated in (False, True):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
        if is_evaluated:
            evaluate()
        states.append((torch.rand(3).tolist(), random.random(), np.random.rand()))  # noqa: NPY002
    assert states[0] == states[1]


def test_what_is_made_in_inference_mode_can_be_used_outside():
    with torch.inference_mode():
        _, recorder = evaluate()
    assert not recorder.batches[0].pixels.is_inference()


def test_metrics_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="got `recorder` twice"):
        Evaluator(setting_of(), [Recorder(), Recorder()])


def test_shared_work_is_done_once_for_a_batch():
    _, recorder = evaluate(count=4)
    calls = []

    def count(pixels):
        calls.append(len(pixels))
        return pixels.float().mean()

    (batch,) = recorder.batches
    assert batch.once(count) == batch.once(count)
    assert calls == [4]


def test_networks_of_equal_settings_are_loaded_once():
    class Network:
        loaded = 0

        def __init__(self, seed):
            self.seed = seed

        def load(self):
            Network.loaded += 1
            return object()

    pool = setting_of().pool
    assert pool.load(Network(1)) is pool.load(Network(1))
    assert pool.load(Network(2)) is not pool.load(Network(1))
    assert Network.loaded == 2


# Images of the start


def test_the_start_is_kept_and_compared_with(tmp_path):
    start = StartImages(tmp_path / "start")
    _, first = evaluate(start=start, keep=True)
    assert start.is_of(setting_of())
    _, later = evaluate(ToyGenerator(offset=1e-4), start=start)
    for before, now in zip(first.batches, later.batches, strict=True):
        assert torch.equal(before.start_pixels, before.pixels)
        assert torch.equal(now.start_pixels, before.pixels)


def test_an_image_that_was_not_finite_at_the_start_is_known(tmp_path):
    start = StartImages(tmp_path / "start")
    evaluate(ToyGenerator(bad_captions=["caption 1"]), start=start, keep=True)
    _, later = evaluate(start=start)
    assert later.batches[0].counted.tolist() == [True] * 4
    assert later.batches[0].start_finite.tolist() == [True, False, True, True]


@pytest.mark.parametrize("changed", [{"count": 6}, {"eval_seed": 4}, {"batch_size": 5}])
def test_a_start_of_other_images_is_none(tmp_path, changed):
    start = StartImages(tmp_path / "start")
    assert not start.is_of(setting_of())
    evaluate(start=start, keep=True)
    assert not start.is_of(setting_of(**changed))


def test_a_start_that_was_made_in_another_way_is_none(tmp_path):
    start = StartImages(tmp_path / "start", "10 steps")
    evaluate(start=start, keep=True)
    assert StartImages(tmp_path / "start", "10 steps").is_of(setting_of())
    assert not StartImages(tmp_path / "start", "3 steps").is_of(setting_of())


def test_a_start_that_is_not_whole_is_none(tmp_path):
    start = StartImages(tmp_path / "start")
    evaluate(start=start, keep=True)
    (tmp_path / "start" / "batch-00001.safetensors").unlink()
    assert not start.is_of(setting_of())


def test_a_damaged_start_is_named(tmp_path):
    start = StartImages(tmp_path / "start")
    evaluate(start=start, keep=True)
    (tmp_path / "start" / "batch-00000.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="batch-00000"):
        evaluate(start=start)
