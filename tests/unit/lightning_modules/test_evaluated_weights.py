"""An evaluation that is not of what the run has trained says so."""

import copy
import logging

from tiny_run import model_settings, write_run

from lightning_modules.resume_checks import warn_of_other_weights


def warnings_of(caplog, config, run_dir, checkpoint):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_other_weights(config, run_dir, checkpoint)
    return [record.getMessage() for record in caplog.records]


def test_forgotten_checkpoints_and_other_settings_are_named(tmp_path, caplog):
    settings = model_settings()
    checkpoint = write_run(tmp_path / "run", settings, ema=False)
    own, other = {"model": settings}, {"model": copy.deepcopy(settings)}
    other["model"]["init_args"]["text"]["token_budget"] = 32
    assert warnings_of(caplog, own, tmp_path / "run", checkpoint) == []
    assert warnings_of(caplog, own, tmp_path / "empty", None) == []
    (forgotten,) = warnings_of(caplog, own, tmp_path / "run", None)
    assert forgotten.startswith("no `--ckpt_path` was given: ")
    (changed,) = warnings_of(caplog, other, tmp_path / "run", checkpoint)
    assert "`model.init_args.text.token_budget` (64 -> 32)" in changed
    assert "give `--config " in changed
