"""A run that falls behind its search's other trials stops, on all ranks alike, and says so."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import optuna
import pytest
from lightning.pytorch.strategies import DDPStrategy
from torch import multiprocessing
from toy_house import ToyData, ToyModule

from callbacks.optuna_pruning import OptunaPruning
from segalign.error_boundary import run_guarded
from segalign.errors import ConfigError, PrunedError
from segalign.launch.searching import trial_storage
from segalign.launch.searching.trial_storage import (
    TrialRecord,
    open_storage,
    open_trial,
    write_trial,
)

OTHERS = {2: 0.5, 4: 0.6, 6: 0.7}  # what finished trials had after so many steps
BETTER = {2: 0.6, 4: 0.7, 6: 0.8}


class Scripted(ToyModule):
    """Logs a given value after each step; other ranks log what would never be stopped."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def validation_step(self, batch, batch_idx):
        value = self.values.get(self.global_step, 0.0) if self.global_rank == 0 else 9.0
        self.log("val/score", value, rank_zero_only=False)


class Witness(pl.Callback):
    """Writes, for each rank, after which steps its validations ended and what ended the run."""

    def note(self, trainer, text):
        with (Path(trainer.default_root_dir) / f"rank-{trainer.global_rank}").open("a") as file:
            file.write(f"{text}\n")

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.note(trainer, trainer.global_step)

    def on_exception(self, trainer, pl_module, exception):
        self.note(trainer, exception)

    def on_train_end(self, trainer, pl_module):
        self.note(trainer, "end")


@pytest.fixture
def search(tmp_path):
    """Make a search with finished trials, and one that runs."""
    study = optuna.create_study(
        study_name="toy",
        storage=open_storage(str(tmp_path / "optuna.journal")),
        direction="maximize",
    )
    for _ in range(5):
        done = optuna.create_trial(value=0.7, intermediate_values=OTHERS)
        study.add_trial(done)
    study.ask()
    write_trial(tmp_path, record(tmp_path))
    return study


def record(run_dir: Path) -> TrialRecord:
    return TrialRecord(storage=str(run_dir / "optuna.journal"), study="toy", number=5)


def fit(run_dir: Path, values, *, devices: int = 1, monitor: str = "val/score", max_steps: int = 6):
    pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto",
        max_steps=max_steps,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
        callbacks=[OptunaPruning("toy", monitor), Witness()],
    ).fit(Scripted(values), ToyData())


def notes(run_dir: Path, rank: int = 0) -> list[str]:
    return (run_dir / f"rank-{rank}").read_text().splitlines()


def reported(run_dir: Path) -> dict[int, float]:
    (trial,) = open_trial(record(run_dir)).study.get_trials(
        states=(optuna.trial.TrialState.RUNNING,)
    )
    return trial.intermediate_values


def test_a_run_that_falls_behind_stops_with_one_line_and_a_code(search, tmp_path, capsys):
    assert run_guarded(lambda: fit(tmp_path, {2: 0.1})) == 86
    assert capsys.readouterr().err.splitlines()[-1] == (
        "stopped: pruned by the searcher at step 2: by `val/score`, other trials do better."
    )
    # The validation's other callbacks have ended.
    assert notes(tmp_path)[0] == "2"
    assert reported(tmp_path) == {2: pytest.approx(0.1)}


def test_a_run_that_does_not_fall_behind_ends_as_any_other(search, tmp_path):
    fit(tmp_path, BETTER)
    assert notes(tmp_path) == ["2", "4", "6", "end"]
    assert reported(tmp_path) == pytest.approx(BETTER)


def test_the_last_validation_stops_nothing(search, tmp_path):
    fit(tmp_path, {2: 0.1}, max_steps=2)
    assert notes(tmp_path) == ["2", "end"]


def test_a_repeated_validation_is_asked_again(search, tmp_path):
    for _ in range(2):
        with pytest.raises(PrunedError):
            fit(tmp_path, {2: 0.1})
    assert reported(tmp_path) == {2: pytest.approx(0.1)}


def no_trial(run_dir):
    (run_dir / "sweep" / "trial.json").unlink()


def no_journal(run_dir):
    (run_dir / "optuna.journal").unlink()


def other_trial(run_dir):
    path = run_dir / "sweep" / "trial.json"
    path.write_text(path.read_text().replace('"number": 5', '"number": 77'))


def finished_trial(run_dir):
    open_trial(record(run_dir)).study.tell(5, state=optuna.trial.TrialState.FAIL)


@pytest.mark.parametrize(
    ("spoil", "warning"),
    [
        (no_trial, None),
        (no_journal, "no such file"),
        (other_trial, "cannot be read"),
        (finished_trial, "does not answer"),
    ],
)
def test_a_run_outlives_its_searcher(search, tmp_path, caplog, spoil, warning):
    spoil(tmp_path)
    with caplog.at_level(logging.WARNING, logger="callbacks.optuna_pruning"):
        fit(tmp_path, {2: 0.1})
    assert notes(tmp_path) == ["2", "4", "6", "end"]
    said = [one.getMessage() for one in caplog.records if one.name == "callbacks.optuna_pruning"]
    assert len(said) == (warning is not None)
    assert all(warning in one for one in said)
    assert not (spoil is no_journal and (tmp_path / "optuna.journal").exists())


def test_a_value_that_is_not_logged_is_named(search, tmp_path, caplog):
    fit(tmp_path, {2: 0.1}, monitor="val/nothing")
    assert notes(tmp_path)[-1] == "end"
    said = [one.getMessage() for one in caplog.records if one.name == "callbacks.optuna_pruning"]
    assert said == ["this run cannot be pruned yet: validation logs no `val/nothing`"]


def fit_one_of_two(rank: int, run_dir: str, port: int) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stderr = (Path(run_dir) / f"said-{rank}").open("w", buffering=1)
    try:
        code = run_guarded(lambda: fit(Path(run_dir), {2: 0.1}, devices=2))
    except SystemExit as ended:
        code = ended.code
    (Path(run_dir) / f"code-{rank}").write_text(str(code))


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")
def test_all_ranks_stop_at_the_same_step(search, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        arguments = (str(tmp_path), free.getsockname()[1])
    multiprocessing.start_processes(fit_one_of_two, arguments, nprocs=2, start_method="fork")
    for rank in range(2):
        assert notes(tmp_path, rank)[0] == "2"
        assert len(notes(tmp_path, rank)) == 2
    assert [(tmp_path / f"code-{rank}").read_text() for rank in range(2)] == ["86", "86"]
    said = [(tmp_path / f"said-{rank}").read_text().count("stopped: pruned") for rank in range(2)]
    assert said == [1, 0]
    assert reported(tmp_path) == {2: pytest.approx(0.1)}


@pytest.mark.distributed
def test_a_rank_that_has_ended_has_no_other_killed(search, toy_config, tmp_path, repository):
    for _ in range(9):
        search.add_trial(optuna.create_trial(value=9.0, intermediate_values={2: 9.0}))
    # The rank that launched the other looks at it every 5 s; `srun` sends SIGTERM.
    pruning = {"search": "toy", "monitor": "val/loss"}
    slow = {"seconds": 8, "number": int(signal.SIGTERM)}
    options = [
        f"--config={toy_config}", f"--run_dir={tmp_path}", "--allow_import=toy_house",
        "--allow_import=toy_signals", "--trainer.devices=2", "--trainer.strategy=ddp",
        "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2",
        "--trainer.check_val_every_n_epoch=null",
        "--trainer.callbacks+=callbacks.optuna_pruning.OptunaPruning",
        f"--trainer.callbacks.init_args={json.dumps(pruning)}",
        "--trainer.callbacks+=toy_signals.SlowEnd",
        f"--trainer.callbacks.init_args={json.dumps(slow)}",
    ]  # fmt: skip
    path = os.pathsep.join([str(repository), str(repository / "tests" / "toys")])
    ended = subprocess.run(
        [sys.executable, "main.py", "fit", *options],
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 86, ended.stderr
    assert ended.stderr.count("stopped: pruned by the searcher at step 2") == 1


def test_without_optuna_the_run_says_what_to_install(monkeypatch, tmp_path):
    def missing(name):
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(trial_storage.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r'pip install "segalign\[optuna\]"'):
        fit(tmp_path, BETTER)


def test_the_callback_is_imported_without_optuna():
    code = (
        "import sys; sys.modules['optuna'] = sys.modules['optuna_integration'] = None;"
        "import callbacks.optuna_pruning, segalign.launch.searching.search_rounds"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
