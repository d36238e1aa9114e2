import logging

import pytest

from lightning_modules.resume_checks import Change, changes_optimizer, check_same_settings
from segalign.errors import ConfigError
from segalign.run_format import save_checkpoint

STORED = {
    "seed_everything": 1,
    "model": {
        "class_path": "a.B",
        "init_args": {
            "max_grad_norm": 1.0,
            "width": 6,
            "optimizer": {"class_path": "c.D", "init_args": {"lr": 0.1, "eps": 1.0}},
        },
    },
    "data": {"class_path": "e.F", "init_args": {"root": "here", "batch": 2}},
}


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoints" / "step-00000001"
    save_checkpoint({"global_step": 1, "run_config": STORED}, path)
    return path


def config(*allowed, **changes):
    model = {**STORED["model"]["init_args"], **changes}
    data = {**STORED["data"]["init_args"], "root": "there"}
    return {
        "seed_everything": 1,
        "model": {"class_path": "a.B", "init_args": model},
        "data": {"class_path": "e.F", "init_args": data},
        "trainer": {"max_steps": 3},
        "checkpoint": {"allow_changes": list(allowed)},
    }


def test_a_change_is_refused_and_the_way_out_named(checkpoint):
    with pytest.raises(ConfigError, match=r"`model\.init_args\.width` \(6 -> 7\)\.") as caught:
        check_same_settings(config(width=7), checkpoint)
    assert "(`--checkpoint.allow_changes '[model.init_args.width]'`)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_named_change_is_allowed_with_a_warning(checkpoint, caplog):
    with caplog.at_level(logging.WARNING):
        check_same_settings(config("model.init_args.width", width=7), checkpoint)
    assert caplog.messages == [
        "going on with a changed setting, as allowed: `model.init_args.width` (6 -> 7)"
    ]


def test_only_what_is_named_is_allowed(checkpoint):
    changes = {"width": 7, "max_grad_norm": 2.0}
    with pytest.raises(ConfigError, match=r"changed: `model\.init_args\.max_grad_norm`") as caught:
        check_same_settings(config("model.init_args.width", **changes), checkpoint)
    assert "width" not in str(caught.value)
    # A name is no prefix of another's letters.
    with pytest.raises(ConfigError):
        check_same_settings(config("model.init_args.wid", width=7), checkpoint)


def test_a_part_of_the_config_may_be_named(checkpoint, caplog):
    optimizer = {"class_path": "c.D", "init_args": {"lr": 0.2, "eps": 2.0}}
    with caplog.at_level(logging.WARNING):
        check_same_settings(config("model.init_args.optimizer", optimizer=optimizer), checkpoint)
    assert len(caplog.messages) == 2
    assert "optimizer.init_args.lr` (0.1 -> 0.2)" in caplog.text


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("model.init_args.width", "has not changed"),
        ("model.init_args.widht", "is no setting of this run"),
        ("model.init_args.width.more", "is no setting of this run"),
        ("trainer.max_steps", "may always differ"),
        ("data.init_args.root", "may always differ"),
    ],
)
def test_a_name_that_is_not_needed_is_told(checkpoint, caplog, key, reason):
    with caplog.at_level(logging.WARNING):
        check_same_settings(config(key), checkpoint)
    assert caplog.messages == [
        f"`checkpoint.allow_changes` names `{key}`, which {reason}; leave it out"
    ]


AVERAGE = {"class_path": "callbacks.ema.EMA", "init_args": {"decay": 0.9}}


@pytest.mark.parametrize(
    ("setting", "now", "key"),
    [
        ("gradient_clip_val", 0.1, "trainer.gradient_clip_val"),
        ("precision", "bf16-mixed", "trainer.precision"),
        ("callbacks", [{**AVERAGE, "init_args": {"decay": 0.5}}], "trainer.callbacks.EMA"),
        ("callbacks", None, "trainer.callbacks.EMA"),
        ("callbacks", [AVERAGE, {"class_path": "callbacks.fid.FID"}], None),
        ("log_every_n_steps", 7, None),
    ],
)
def test_settings_of_the_trainer_count_where_they_decide_what_a_step_computes(
    tmp_path, setting, now, key
):
    trainer = {
        "gradient_clip_val": 1.0,
        "precision": None,
        "log_every_n_steps": 1,
        "callbacks": [AVERAGE],
    }
    path = tmp_path / "checkpoints" / "step-00000001"
    save_checkpoint({"global_step": 1, "run_config": {**STORED, "trainer": trainer}}, path)
    changed = {**config(), "trainer": {**trainer, setting: now}}
    if key is None:
        assert check_same_settings(changed, path) == []
        return
    with pytest.raises(ConfigError, match=f"changed: `{key}` "):
        check_same_settings(changed, path)
    changed["checkpoint"] = {"allow_changes": [key]}
    assert [change.key for change in check_same_settings(changed, path)] == [key]


def test_another_kind_of_optimizer_is_never_taken():
    rate = Change("model.init_args.optimizer.init_args.lr", "1", "2")
    assert changes_optimizer([rate])
    assert not changes_optimizer([Change("model.init_args.width", "1", "2")])
    for key in ("model.init_args.optimizer.class_path", "model.init_args.lr_scheduler"):
        with pytest.raises(ConfigError, match="the kind of optimizer"):
            changes_optimizer([rate, Change(key, "A", "B")])
