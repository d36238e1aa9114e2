import logging

import pytest

from lightning_modules.resume_checks import check_same_settings
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
    assert "name those that may differ in `checkpoint.allow_changes`" in str(caught.value)
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
