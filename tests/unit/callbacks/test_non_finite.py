"""Steps that were skipped: counted, told, kept in a checkpoint, and bounded."""

import json
from types import SimpleNamespace

import pytest
import torch

from callbacks.ema import EMA
from callbacks.non_finite import NonFiniteSteps
from segalign.errors import NonFiniteError
from segalign.skipped_steps import RankFinding, SkipCounter, SkippedStep, agree_on_skip


class Module(torch.nn.Linear):
    """Says what was skipped, and keeps what is logged."""

    def __init__(self):
        super().__init__(1, 1)
        self.skipped, self.is_left_out, self.logged = None, False, []

    def log(self, name, value):
        self.logged.append((name, value))


class Run:
    """Steps of a trainer, as callbacks see them."""

    def __init__(self, folder, *callbacks, step=0, is_global_zero=True):
        self.callbacks, self.module = callbacks, Module()
        self.trainer = SimpleNamespace(
            global_step=step, is_global_zero=is_global_zero, default_root_dir=str(folder)
        )
        self.call("on_fit_start")
        self.call("on_train_start")

    def call(self, name, *arguments):
        for callback in self.callbacks:
            getattr(callback, name)(self.trainer, self.module, *arguments)

    def step(self, *kinds):
        """Take steps; each is bad or not."""
        for is_bad in kinds:
            step = self.trainer.global_step
            self.module.skipped = bad(step) if is_bad else None
            self.module.is_left_out = is_bad
            self.call("on_train_batch_end", None, None, 2 * step)  # a micro-batch before its step
            self.trainer.global_step += 1
            self.call("on_train_batch_end", None, None, 2 * step + 1)


def bad(step):
    return SkippedStep(step, "the losses of 1 samples are not finite", (7, step))


def lines(folder):
    return [json.loads(line) for line in (folder / "logs/skipped_steps.jsonl").open()]


def test_a_skipped_step_is_told_once(tmp_path):
    run = Run(tmp_path, NonFiniteSteps())
    run.step(False)
    assert run.module.logged == []
    run.step(True, False)
    assert lines(tmp_path) == [
        {"step": 1, "reason": "the losses of 1 samples are not finite", "sample_ids": [7, 1]}
    ]
    # How many there were, from the first one on.
    assert run.module.logged == [("train/skipped_steps", 1.0)] * 3


def test_only_the_first_rank_writes(tmp_path):
    Run(tmp_path, NonFiniteSteps(), is_global_zero=False).step(True)
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / "logs").write_text("in the way")
    Run(tmp_path, NonFiniteSteps()).step(True)
    assert [
        one for one in caplog.messages if "is not complete: expected to be able to write" in one
    ]


def test_ten_in_a_row_end_the_run(tmp_path):
    run = Run(tmp_path, NonFiniteSteps(max_share=1))
    run.step(*[True] * 9, False, *[True] * 9)
    message = (
        r"^expected finite losses and gradients; got 10 skipped steps in a row, the last of them "
        r"step 19: the losses of 1 samples are not finite; samples 7, 19; no weight was changed; "
        r"look at the samples in logs/skipped_steps\.jsonl, lower [^\n]*$"
    )
    with pytest.raises(NonFiniteError, match=message) as error:
        run.step(True)
    assert error.value.exit_code == 70
    assert len(lines(tmp_path)) == 19


def test_too_large_a_share_ends_the_run(tmp_path):
    run = Run(tmp_path, NonFiniteSteps(max_share=0.03, window=100))
    # Three of a hundred are allowed, also while there were not a hundred yet.
    run.step(True, False, True, False, True)
    run.step(*[False] * 95)
    # The first one is too long ago to count.
    run.step(True, False)
    with pytest.raises(NonFiniteError, match="got 4 skipped steps among the last 100, "):
        run.step(True, True)
    assert run.trainer.global_step == 104


def test_a_resumed_run_counts_on(tmp_path):
    first = Run(tmp_path, callback := NonFiniteSteps())
    first.step(*[True] * 6)
    stored = json.loads(json.dumps(callback.state_dict()))
    first.step(True, True)  # which the resumed run takes once more
    callback = NonFiniteSteps()
    callback.load_state_dict(stored)
    second = Run(tmp_path, callback, step=6)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4, 5]
    second.step(*[True] * 3)
    with pytest.raises(NonFiniteError, match=r"got 10 skipped steps in a row, .* step 9: "):
        second.step(True)
    assert [line["step"] for line in lines(tmp_path)] == list(range(10))


def test_a_damaged_line_of_the_log_is_left_out(tmp_path):
    run = Run(tmp_path, NonFiniteSteps())
    run.step(True)
    with (tmp_path / "logs/skipped_steps.jsonl").open("a") as file:
        file.write("[]\n" + 100_000 * "[" + '\n{"step": 1, "rea')
    run.step(False, True)
    assert [line["step"] for line in lines(tmp_path)] == [0, 2]


@pytest.mark.parametrize("steps", [[True], [False, True], [True, False]])
def test_the_average_stays_where_it_is(steps, tmp_path):
    run = Run(tmp_path, EMA(decay=0.5, warmup=False))
    start = run.module.weight.detach().clone()
    with torch.no_grad():
        run.module.weight += 1
    run.step(*steps)
    num_good = steps.count(False)
    assert run.module.ema.num_updates == num_good
    assert torch.equal(run.module.ema.weights["weight"], start.lerp(start + 1, 0.5 * num_good))


def test_a_window_shorter_than_a_row_still_sees_rows():
    counter = SkipCounter(max_in_a_row=5, max_share=1.0, window=2)
    for step in range(5):
        assert counter.too_many() is None
        counter.add(step, is_skipped=True)
    assert counter.too_many() == "5 skipped steps in a row"


def test_samples_and_weights_are_named_up_to_a_number():
    own = RankFinding([], range(9), "the penalty", [f"w{i}" for i in range(9)])
    assert str(agree_on_skip(3, own)) == (
        "step 3: the losses are finite, and their gradient is not: `w0`, `w1`, `w2`, ... "
        "(the penalty); samples 0, 1, 2, ...; no weight was changed"
    )
    assert agree_on_skip(3, own).sample_ids == tuple(range(9))
