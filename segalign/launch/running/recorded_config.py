"""Whether the config that training has left in a run directory is that of the run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from segalign.errors import ConfigError
from segalign.launch.running.run_spec import NOT_HASHED
from segalign.launch.study_place import brief
from segalign.launch.yaml_dialect import read_yaml

RECORDED_FILE: Final = "config.yaml"
# What says where and how a run is made, besides what its id leaves out.
_FREE: Final = (*NOT_HASHED, "ckpt_path", "trainer.devices", "trainer.num_nodes")


def check_recorded(run_dir: Path, config: Path) -> None:
    """Refuse a run directory in which another config was trained.

    A setting that only one of the configs knows is an argument that the code has gained or lost,
    and counts as unchanged.

    Args:
        run_dir: The run directory; one without a record passes.
        config: The config that is to be trained there.

    Raises:
        ConfigError: If they differ, or one of them cannot be read.
    """
    path = run_dir / RECORDED_FILE
    if not path.exists():
        return
    recorded, planned = read_yaml(path, "the config of a run"), read_yaml(config, "a config")
    changed = _what_differs(recorded, planned)
    if changed is not None:
        raise ConfigError(
            f"expected a run directory of config {run_dir.name}; `{path}` is that of another "
            f"config, {changed}. Move the directory away; `python main.py sweep run STUDY` makes "
            "it anew."
        )


def _what_differs(recorded: Any, planned: Any) -> str | None:
    if not isinstance(recorded, Mapping) or not isinstance(planned, Mapping):
        return f"got {brief(recorded)}" if recorded != planned else None
    if not recorded.keys() & planned.keys() - {*_FREE}:
        return "which has none of its settings"
    key, before, now = next(_differences(recorded, planned, ""), ("", None, None))
    return f"`{key}` is {brief(before)} there and {brief(now)} here" if key else None


def _differences(before: Any, now: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """List settings that both know, with their values, where they differ."""
    # What refers to another setting is only known once it is resolved, as records are.
    if key in _FREE or (isinstance(now, str) and "${" in now):
        return
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in now:
            if name in before:
                yield from _differences(before[name], now[name], f"{key}.{name}" if key else name)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for place, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(*pair, f"{key}[{place}]")
    elif before != now:
        yield key, before, now
