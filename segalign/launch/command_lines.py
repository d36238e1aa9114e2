"""The command line by which a stage of a run is configured."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from segalign.launch.points import RunPoint
from segalign.launch.study import Stage, Study
from segalign.launch.yaml_dialect import dump_line

# Stands for the run directory, which has the digest of the config as its name.
RUN_DIR_MARK: Final = "__run_dir__"


def stage_arguments(study: Study, point: RunPoint, stage: Stage) -> list[str]:
    """Write what follows ``main.py STAGE``; its run directory is `RUN_DIR_MARK`."""
    layers = [*map(str, point.configs), *setting_layers(point.settings)]
    if stage == "test":
        layers += [*_names(study.test.configs), *setting_layers(study.test.settings)]
    return [
        *(f"--config={layer}" for layer in layers),
        f"--seed_everything={point.seed}",
        f"--run_dir={RUN_DIR_MARK}",
    ]


def setting_layers(settings: Mapping[str, Any]) -> list[str]:
    """Write settings as configs of one line each, to be layered in this order.

    They are no ``--key=value`` options, because a config keeps the types of values: of the text
    ``null``, an option makes nothing. Keys of which one is a part of another go into two layers, so
    that the parser, which knows what belongs to a class, joins them.
    """
    layers: list[dict[str, Any]] = []
    for key, value in settings.items():
        if not layers or any(_overlap(key, other) for other in layers[-1]):
            layers.append({})
        layers[-1][key] = value
    return [dump_line(_nested(layer)) for layer in layers]


def put_run_dir(value: Any, run_dir: str) -> Any:
    """Copy a config with the real run directory in it."""
    if isinstance(value, Mapping):
        return {key: put_run_dir(one, run_dir) for key, one in value.items()}
    if isinstance(value, list):
        return [put_run_dir(one, run_dir) for one in value]
    return value.replace(RUN_DIR_MARK, run_dir) if isinstance(value, str) else value


def _names(paths: Iterable[Path]) -> list[str]:
    return [str(path) for path in paths]


def _overlap(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into mappings in mappings."""
    root: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, last = key.split(".")
        place = root
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return root
