import errno
import os
import shutil

import pytest
from lightning.pytorch import Trainer

from callbacks.checkpoint import RunCheckpoint
from segalign.atomic import remove_directory


def test_old_checkpoints_that_cannot_go_do_not_end_a_run(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr("callbacks.checkpoint.prune_checkpoints", refuse)
    RunCheckpoint()._prune(Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path))
    assert "old checkpoints stay for now: " in caplog.text


@pytest.mark.parametrize("code", [errno.ENOTEMPTY, errno.EBUSY])
def test_what_stays_of_a_removed_directory_has_lost_its_name(tmp_path, monkeypatch, code):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    (tmp_path / "old").mkdir()
    with monkeypatch.context() as busy:
        busy.setattr(os, "rmdir", refuse)
        remove_directory(tmp_path / "old")
    assert not (tmp_path / "old").exists()
    shutil.rmtree(tmp_path)
