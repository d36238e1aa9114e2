"""What every test gets: a clean environment, one thread, and a way to run commands in process."""

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--nightly", action="store_true", help="Let tests of reliability kill and corrupt for long."
    )


@pytest.fixture(autouse=True)
def _clean_environment():
    """Undo what a test, or Lightning's seeding, writes into the environment."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("SEGALIGN_", "PL_", "SLURM_", "JSONARGPARSE_")):
            del os.environ[name]
    os.environ["HF_HUB_OFFLINE"] = "1"
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _one_thread():
    """Keep sums in one order, and tests from competing for cores."""
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)


@pytest.fixture
def seed() -> int:
    return 1234


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def repository() -> Path:
    return TESTS.parent


TOY_CONFIG = """\
seed_everything: 7
vars: {lr: 0.01}
model:
  class_path: toy_house.ToyModule
  init_args:
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: "${vars.lr}"}}
data:
  class_path: toy_house.ToyData
  init_args: {seed: "${seed_everything}"}
trainer:
  accelerator: cpu
  max_steps: 12
  log_every_n_steps: 1
  limit_val_batches: 0
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: callbacks.ema.EMA
    - class_path: toy_house.LossRecorder
checkpoint: {every_n_steps: 5}
"""


@pytest.fixture(scope="session")
def toy_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of a tiny run, as a file."""
    path = tmp_path_factory.mktemp("toy") / "toy.yaml"
    path.write_text(TOY_CONFIG)
    return path


@pytest.fixture
def toy_command(toy_config: Path, run_dir: Path):
    """Run ``main.py`` in this process on the toy config; returns its exit code."""
    import main

    def run(stage: str, *arguments: str, configs: tuple[Path, ...] = ()) -> int:
        files = [f"--config={path}" for path in (toy_config, *configs)]
        permission = "--allow_import=toy_house"
        return main.main([stage, permission, *files, f"--run_dir={run_dir}", *arguments])

    return run
