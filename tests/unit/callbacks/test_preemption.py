"""A signal sets a flag, handlers are put back, and the line says what was done."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import distributed

from callbacks import preemption as preemption_module
from callbacks.checkpoint import RunCheckpoint
from callbacks.preemption import Preemption
from callbacks.signal_flag import SignalFlag, ignore
from segalign.errors import ConfigError, PreemptedError
from segalign.launch.slurm.requeue import RequeueOutcome


@pytest.fixture(autouse=True)
def _same_handlers():
    """Leave no handler to the next test."""
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_only_sets_the_flag_and_the_handler_of_before_returns():
    flag, heard = SignalFlag(signal.SIGUSR1), []
    signal.signal(signal.SIGUSR1, lambda *_: heard.append("before"))
    before = signal.getsignal(signal.SIGUSR1)
    flag.listen()
    assert not flag.is_set
    signal.raise_signal(signal.SIGUSR1)
    assert flag.is_set
    assert heard == []
    flag.stop()
    assert signal.getsignal(signal.SIGUSR1) is before
    flag.stop()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_listening_again_displaces_a_handler_that_came_between():
    flag = SignalFlag(signal.SIGUSR1)
    before = signal.getsignal(signal.SIGUSR1)
    flag.listen()
    signal.signal(signal.SIGUSR1, lambda *_: pytest.fail("chained"))
    flag.listen()
    signal.raise_signal(signal.SIGUSR1)
    assert flag.is_set
    flag.stop()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_flag_that_is_put_back_after_its_end_hands_on():
    flag, heard = SignalFlag(signal.SIGUSR1), []
    signal.signal(signal.SIGUSR1, lambda *_: heard.append("before"))
    flag.listen()
    own = signal.getsignal(signal.SIGUSR1)
    flag.stop()
    signal.signal(signal.SIGUSR1, own)
    signal.raise_signal(signal.SIGUSR1)
    assert heard == ["before"]
    assert not flag.is_set


def test_a_signal_that_is_ignored_meanwhile_stays_so():
    flag = SignalFlag(signal.SIGTERM)
    flag.listen()
    ignore(signal.SIGTERM)
    flag.stop()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_forked_child_ends_by_its_parent_alone(number):
    flag = SignalFlag(number)
    flag.listen()
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    other = os.fork()
    if other == 0:
        os.kill(child, signal.SIGTERM)
        os._exit(0)
    os.waitpid(other, 0)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    flag.stop()


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_finished_run_leaves_the_handlers_of_before(toy_command, name):
    numbers = (signal.SIGUSR1, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    assert toy_command("fit", f"--preemption.signal={name}", "--trainer.max_steps=2") == 0
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_failed_run_does_not_keep_the_signal(toy_command, monkeypatch):
    heard = []
    signal.signal(signal.SIGUSR1, lambda *_: heard.append("before"))

    def fail(*_):
        raise ConfigError("expected no failure; got one.")

    monkeypatch.setattr("toy_house.ToyModule.training_step", fail)
    assert toy_command("fit", "--preemption.signal=USR1") == 78
    signal.raise_signal(signal.SIGUSR1)
    assert heard == ["before"]


def test_no_signal_installs_nothing(toy_command, monkeypatch):
    monkeypatch.setattr(preemption_module, "SignalFlag", lambda _: pytest.fail("installed"))
    assert toy_command("fit", "--trainer.max_steps=1") == 0
    assert toy_command("validate", "--preemption.signal=USR1", "--ckpt_path=auto") == 0


def test_a_job_that_would_start_over_is_refused(toy_command, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    options = ["--preemption.signal=USR1", "--checkpoint.overwrite=true", "--trainer.max_steps=1"]
    assert toy_command("fit", *options) == 78
    assert "expected a job that is requeued to go on where it was" in capsys.readouterr().err
    assert toy_command("fit", *options, "--preemption.requeue=false") == 0


class Stopping:
    """A run in its seventh step, and how often its job was asked to be put back."""

    def __init__(self, monkeypatch, outcome: RequeueOutcome | None, **settings):
        self.asked: list[int] = []
        checkpoint = RunCheckpoint()
        monkeypatch.setattr(checkpoint, "save_step", lambda _: Path("RUN/step-7"))
        monkeypatch.setattr(preemption_module, "requeue", self.requeue)
        self.outcome = outcome
        self.trainer = SimpleNamespace(
            checkpoint_callbacks=[checkpoint],
            fast_dev_run=False,
            global_step=6,
            is_global_zero=True,
            strategy=SimpleNamespace(launcher=None),
            world_size=1,
            _signal_connector=SimpleNamespace(_original_handlers={}),
        )
        self.callback = Preemption(signal="USR2", **settings)
        self.callback.setup(self.trainer, None, "fit")
        self.callback.on_fit_start(self.trainer, None)

    def requeue(self, max_requeues: int) -> RequeueOutcome:
        self.asked.append(max_requeues)
        return self.outcome

    def step(self) -> str:
        self.callback.on_train_start(self.trainer, None)
        signal.raise_signal(signal.SIGUSR2)
        self.callback.on_train_batch_end(self.trainer, None, None, None, 0)
        self.callback.on_train_batch_start(self.trainer, None, None, 1)  # no step has ended yet
        self.trainer.global_step += 1
        self.callback.on_train_batch_end(self.trainer, None, None, None, 1)
        for number in (signal.SIGUSR2, signal.SIGTERM):  # the second comes from the requeue
            signal.raise_signal(number)
        with pytest.raises(PreemptedError) as stopped:
            self.callback.on_train_batch_start(self.trainer, None, None, 2)
        self.callback.on_exception(self.trainer, None, stopped.value)
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.raise_signal(number)
        return str(stopped.value)


@pytest.mark.parametrize(
    ("outcome", "end"),
    [
        (RequeueOutcome(job="7", requeued=True), "SLURM job 7 is back in the queue"),
        (
            RequeueOutcome(job="7", requeued=False, reason="no"),
            "SLURM job 7 is not requeued: no; go on with `--ckpt_path auto`",
        ),
        (RequeueOutcome(job=None, requeued=False), "go on with `--ckpt_path auto`"),
    ],
)
def test_a_job_is_put_back_once_and_the_line_says_so(monkeypatch, outcome, end):
    run = Stopping(monkeypatch, outcome, max_requeues=3)
    said = "SIGUSR2 came, and training ended after step 7, saved in `RUN/step-7`; "
    assert run.step() == said + end
    assert run.asked == [3]


def test_no_job_is_put_back_if_it_is_not_to_be(monkeypatch):
    run = Stopping(monkeypatch, None, requeue=False)
    assert run.step().endswith("saved in `RUN/step-7`; go on with `--ckpt_path auto`")
    assert run.asked == []


def test_a_signal_that_came_before_the_first_step_stops_at_once(monkeypatch):
    run = Stopping(monkeypatch, RequeueOutcome(job="7", requeued=True))
    signal.raise_signal(signal.SIGUSR2)
    with pytest.raises(PreemptedError, match="nothing new to save; SLURM job 7 is"):
        run.callback.on_train_start(run.trainer, None)
    assert run.asked == [20]


def test_ranks_agree_every_so_many_steps(monkeypatch):
    run = Stopping(monkeypatch, None, requeue=False, every_n_steps=3)
    run.callback.on_train_start(run.trainer, None)
    asked = []

    def is_told() -> bool:
        asked.append(run.trainer.global_step)
        return False

    monkeypatch.setattr(run.callback, "_is_told", is_told)
    # A batch may take no step, or several.
    for step in (6, 7, 8, 9, 9, 10, 11, 13, 14, 15):
        run.trainer.global_step = step
        run.callback.on_train_batch_end(run.trainer, None, None, None, 0)
    assert asked == [9, 13, 15]


def test_ranks_that_cannot_meet_are_told_what_to_set(monkeypatch, tmp_path):
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    try:
        run = Stopping(monkeypatch, None)
        run.trainer.world_size = 2
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere")
        with pytest.raises(ConfigError, match=r"nowhere.* set GLOO_SOCKET_IFNAME to") as refused:
            run.callback.on_fit_start(run.trainer, None)
        assert "\n" not in str(refused.value)
    finally:
        distributed.destroy_process_group()
