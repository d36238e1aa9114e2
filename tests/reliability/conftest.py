"""What tests of reliability share: how long they try, and processes that have imported all."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from command_client import CommandServer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/reliability" in item.path.as_posix():
            item.add_marker(pytest.mark.reliability)


@pytest.fixture(scope="session")
def is_nightly(pytestconfig: pytest.Config) -> bool:
    """Whether there is a night to try in."""
    return bool(pytestconfig.getoption("--nightly"))


@pytest.fixture(scope="session")
def tries(is_nightly: bool) -> Callable[[int, int], int]:
    """Choose a number of tries: ``tries(20, 200)`` are 20, and 200 with ``--nightly``."""
    return lambda usual, nightly: nightly if is_nightly else usual


@pytest.fixture(scope="session")
def server():
    """A process that has imported all, and forks a child for each command."""
    server = CommandServer()
    yield server
    server.close()


@pytest.fixture
def elsewhere(tmp_path):
    """A directory of another file system than the tests' own."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)
