"""A run directory in which another config was trained is told from one of the run itself."""

import pytest
import yaml

from segalign.errors import ConfigError
from segalign.launch.running.recorded_config import check_recorded

PLANNED = {
    "seed_everything": 1,
    "run_dir": "runs/a",
    "ckpt_path": "auto",
    "preemption": {"signal": None},
    "model": {
        "class_path": "toys.Model",
        "init_args": {"width": 6, "rate": 1e-5, "size": "${seed_everything}"},
    },
    "trainer": {"max_steps": 40, "devices": "auto", "callbacks": [{"init_args": {"note": "a"}}]},
}


@pytest.fixture
def check(run_dir):
    """Check a run directory with a record; None is none."""

    def check(recorded):
        run_dir.mkdir(exist_ok=True)
        (run_dir / "fit.yaml").write_text(yaml.safe_dump(PLANNED))
        if recorded is not None:
            text = recorded if isinstance(recorded, str) else yaml.safe_dump(recorded)
            (run_dir / "config.yaml").write_text(text)
        check_recorded(run_dir, run_dir / "fit.yaml")

    return check


def changed(key, value):
    """Copy the config with another value."""
    copy = yaml.safe_load(yaml.safe_dump(PLANNED))
    place = copy
    *parents, last = key.split(".")
    for parent in parents:
        place = place[int(parent) if isinstance(place, list) else parent]
    place[last] = value
    return copy


@pytest.mark.parametrize(
    "recorded",
    [
        None,
        PLANNED,
        changed("run_dir", "elsewhere"),
        changed("model.init_args.size", 1),
        changed("ckpt_path", None),
        changed("preemption.signal", "USR1"),
        changed("trainer.devices", 2),
        changed("trainer.num_nodes", 2),
        changed("model.init_args.later", 2),  # an argument that code has gained
        changed("trainer.callbacks.0.init_args.later", 2),
    ],
)
def test_the_record_of_the_run_itself_passes(check, recorded):
    check(recorded)


@pytest.mark.parametrize(
    ("recorded", "named"),
    [
        (changed("seed_everything", 2), "`seed_everything` is `2` there and `1` here"),
        (changed("model.class_path", "toys.Other"), "`model.class_path` is `toys.Other` there"),
        (changed("model.init_args.width", 8), "`model.init_args.width` is `8` there and `6` here"),
        (changed("trainer.callbacks", []), "`trainer.callbacks` is nothing there"),
        (changed("trainer.callbacks.0.init_args.note", "b"),
         "`trainer.callbacks[0].init_args.note` is `b` there and `a` here"),
        ({"run_dir": "runs/a"}, "none of its settings"),
        ("just text", "got `just text`"),
        ("", "got nothing"),
    ],
)  # fmt: skip
def test_the_record_of_another_config_is_refused(check, run_dir, recorded, named):
    with pytest.raises(ConfigError) as caught:
        check(recorded)
    line = str(caught.value)
    assert named in line
    assert f"`{run_dir / 'config.yaml'}` is that of another config" in line
    assert "\n" not in line


def test_a_record_that_cannot_be_read_is_refused(check):
    with pytest.raises(ConfigError, match="expected YAML"):
        check("{")
