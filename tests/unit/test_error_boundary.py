import argparse
import os

import pytest
import torch
from omegaconf import OmegaConf

from segalign.error_boundary import run_guarded
from segalign.errors import ConfigError, DataError, NonFiniteError, StorageError


def raiser(error: BaseException):
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("bad\n  key"), 78),
        (DataError("bad key"), 65),
        (StorageError("bad key"), 75),
        (NonFiniteError("bad key"), 70),
        (argparse.ArgumentError(None, "bad key"), 78),
    ],
)
def test_user_errors_are_one_line_and_a_code(capsys, error, code):
    assert run_guarded(raiser(error)) == code
    captured = capsys.readouterr()
    assert captured.err == "error: bad key\n"
    assert captured.out == ""


def wrapped(outer: ValueError, inner: DataError, explicit: bool) -> ValueError:
    try:
        try:
            raise inner
        except DataError as error:
            if explicit:
                raise outer from error
            raise outer  # noqa: B904
    except ValueError as error:
        return error


@pytest.mark.parametrize("explicit", [True, False])
def test_a_user_error_is_found_behind_others(capsys, explicit):
    error = wrapped(ValueError("noise"), DataError("shard 3"), explicit)
    assert run_guarded(raiser(error)) == 65
    assert capsys.readouterr().err == "error: shard 3\n"


class Damaged(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            raise ValueError("expected: noise")
        except ValueError as error:
            raise DataError("expected JSON: line 3;\n got DataError: nothing") from error


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_worker_is_only_its_message(capsys, num_workers):
    loader = torch.utils.data.DataLoader(Damaged(), num_workers=num_workers)
    assert run_guarded(lambda: len(list(loader))) == 65
    assert capsys.readouterr().err == "error: expected JSON: line 3; got DataError: nothing\n"


def test_an_omegaconf_error_is_one_line(capsys):
    def command() -> int:
        return int(OmegaConf.create({"a": "${nope}"}).a)

    assert run_guarded(command) == 78
    line = capsys.readouterr().err
    assert "nope" in line
    assert line.count("\n") == 1


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_guarded(raiser(ZeroDivisionError()))


def test_debugging_shows_the_traceback():
    os.environ["SEGALIGN_DEBUG"] = "1"
    with pytest.raises(ConfigError):
        run_guarded(raiser(ConfigError("x")))


def test_success_is_passed_on():
    assert run_guarded(lambda: 3) == 3
