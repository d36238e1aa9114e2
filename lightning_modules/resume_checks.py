"""Checks on a training run before anything is built or written."""

import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segalign.errors import ConfigError
from segalign.run_directory import newest_checkpoint, stored_config
from segalign.run_start import check_start
from segalign.tree_codec import decode_tree

# Settings of `trainer` that decide what a training step computes; of its callbacks, the average of
# the weights does.
_TRAINER_SETTINGS = ("gradient_clip_val", "gradient_clip_algorithm", "precision")
_AVERAGE = "callbacks.ema.EMA"
_OPTIMIZER_SETTINGS = ("model.init_args.optimizer", "model.init_args.lr_scheduler")
# Settings of `data` that do not: where and how fast it is read, and what evaluation reads. That
# shards at another place hold the same samples is checked by their digest.
_FREE_DATA_SETTINGS = frozenset(
    {
        "accumulate",
        "allow_pipe",
        "limit_val_samples",
        "max_bad_fraction",
        "num_val",
        "num_workers",
        "predict_shards",
        "report_dir",
        "root",
        "strict",
        "train_shards",
        "val_batch_size",
        "val_batches",
        "val_shards",
    }
)
_MAX_NAMED = 3
_logger = logging.getLogger(__name__)


def check_training(
    config: Mapping[str, Any], run_dir: Path, start: Path | None
) -> "Sequence[Change]":
    """Refuse a training run that would never end, ignore its settings or mix with another run.

    Args:
        config: The resolved config, plain data.
        run_dir: The run directory.
        start: The checkpoint to go on from; None starts anew.

    Returns:
        Settings that have changed since that checkpoint, as allowed.

    Raises:
        ConfigError: If it is refused.
        DataError: If the checkpoint cannot be read.
    """
    if config["trainer"].get("fast_dev_run"):
        return []
    check_end(config["trainer"])
    changes = [] if start is None else check_same_settings(config, start)
    if not config["checkpoint"].get("overwrite"):
        check_start(run_dir, start)
    return changes


def check_end(trainer: Mapping[str, Any]) -> None:
    """Refuse a training run without an end.

    Args:
        trainer: Settings of the trainer.

    Raises:
        ConfigError: If nothing ends the run.
    """
    counts_epochs = trainer.get("max_epochs") not in (None, -1) and bool(
        trainer.get("limit_train_batches") or trainer.get("overfit_batches")
    )
    if trainer.get("max_steps") == -1 and trainer.get("max_time") is None and not counts_epochs:
        raise ConfigError(
            "expected `trainer.max_steps` or `trainer.max_time`, because the training data never "
            "end; got neither. Set `trainer.max_steps`."
        )


def check_same_settings(config: Mapping[str, Any], checkpoint: Path) -> "list[Change]":
    """Refuse to go on from a checkpoint that was trained with another model or other data.

    What ``checkpoint.allow_changes`` names may differ, and is told in a warning.

    Args:
        config: The resolved config, plain data.
        checkpoint: The checkpoint to go on from; one that carries no config passes.

    Returns:
        What has changed, as allowed.

    Raises:
        ConfigError: If they differ in a setting that decides what a training step computes.
        DataError: If the checkpoint cannot be read.
    """
    stored = stored_config(checkpoint)
    if stored is None:
        return []
    changes = list(changed_settings(_decoded(stored), config))
    allowed = (config.get("checkpoint") or {}).get("allow_changes") or ()
    refused = [change for change in changes if not change.is_below_any(allowed)]
    if refused:
        raise _refusal(config, checkpoint, refused)
    for change in changes:
        _logger.warning("going on with a changed setting, as allowed: %s", change)
    for key in allowed:
        if not any(change.is_below_any([key]) for change in changes):
            _logger.warning(
                "`checkpoint.allow_changes` names `%s`, which %s; leave it out",
                key,
                _why_needless(config, key),
            )
    return changes


def changes_optimizer(changes: "Sequence[Change]") -> bool:
    """Tell whether settings of the optimizer or its schedule are among those that changed.

    Raises:
        ConfigError: If it is their class, whose state is another.
    """
    found = [change for change in changes if change.is_below_any(_OPTIMIZER_SETTINGS)]
    for change in found:
        if change.key in _OPTIMIZER_SETTINGS or change.key.endswith(".class_path"):
            raise ConfigError(
                "expected the kind of optimizer and schedule that the checkpoint was trained with; "
                f"changed: {change}. Set it back, or train anew from the checkpoint's weights."
            )
    return bool(found)


def _refusal(
    config: Mapping[str, Any], checkpoint: Path, changes: Sequence["Change"]
) -> ConfigError:
    named = ", ".join(map(str, changes[:_MAX_NAMED]))
    keys = ",".join(change.key for change in changes)
    more = f" and {len(changes) - _MAX_NAMED} more" if len(changes) > _MAX_NAMED else ""
    if str(config.get("ckpt_path")) == "auto":
        advice = "choose another `--run_dir`, or start over here with `--checkpoint.overwrite true`"
    else:
        advice = "leave out `--ckpt_path` and choose another `--run_dir`"
    return ConfigError(
        f"expected the settings that `{checkpoint}` was trained with; changed: {named}{more}. "
        f"Set them back, allow them (`--checkpoint.allow_changes '[{keys}]'`), or train anew: "
        f"{advice}."
    )


def _why_needless(config: Mapping[str, Any], key: str) -> str:
    if _has(_decisive(config), key):
        return "has not changed"
    return "may always differ" if _has(config, key) else "is no setting of this run"


def _has(config: Any, key: str) -> bool:
    name, _, rest = key.partition(".")
    is_there = isinstance(config, Mapping) and name in config
    return is_there and (not rest or _has(config[name], rest))


def warn_of_other_weights(
    config: Mapping[str, Any], run_dir: Path, checkpoint: Path | None
) -> None:
    """Say so if an evaluation is not of what the run directory has trained.

    Args:
        config: The resolved config, plain data.
        run_dir: The run directory.
        checkpoint: The checkpoint that is evaluated; None evaluates the config's own start.
    """
    if checkpoint is None:
        if newest_checkpoint(run_dir) is not None:
            _logger.warning(
                "no `--ckpt_path` was given: the weights are those that the config starts from, "
                "not those that `%s` has trained; give `--ckpt_path auto` for these",
                run_dir,
            )
        return
    stored = _decoded(stored_config(checkpoint) or {})
    changes = changed_settings(stored, config)
    changed = [str(change) for change in changes if change.is_below_any(["model"])]
    if changed:
        _logger.warning(
            "the run was trained with other settings of the model: %s; the results are those of "
            "the settings given now; give `--config %s` for its own",
            ", ".join(changed[:_MAX_NAMED]),
            run_dir / "config.yaml",
        )


@dataclass(frozen=True)
class Change:
    """A setting that differs between two configs.

    Attributes:
        key: Its dotted key.
        before: Its value, shortened, in the earlier config.
        now: That in the later one.
    """

    key: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"`{self.key}` ({self.before} -> {self.now})"

    def is_below_any(self, keys: Sequence[str]) -> bool:
        """Tell whether one of some dotted keys names it, or a part of the config that holds it."""
        return any(f"{self.key}.".startswith(f"{key}.") for key in keys)


def changed_settings(stored: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[Change]:
    """Find the settings that changed what a training step computes.

    A setting that only one of the configs knows is an argument that the code has gained or lost,
    and counts as unchanged.
    """
    before, now = _decisive(stored), _decisive(current)
    for section in now:
        if section in before:
            yield from _differences(before[section], now[section], section)


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce a config to what decides what a training step computes."""
    found = {name: config[name] for name in ("seed_everything", "model") if name in config}
    if "data" in config:
        found["data"] = _without(config["data"], _FREE_DATA_SETTINGS)
    if isinstance(config.get("trainer"), Mapping):
        found["trainer"] = _decisive_of_trainer(config["trainer"])
    return found


def _without(settings: Any, names: Container[str]) -> Any:
    """Leave settings of some names out, at any depth."""
    if not isinstance(settings, Mapping):
        return settings
    return {name: _without(value, names) for name, value in settings.items() if name not in names}


def _decisive_of_trainer(trainer: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: trainer[name] for name in _TRAINER_SETTINGS if name in trainer}
    callbacks = trainer.get("callbacks") or []
    averages = [
        callback.get("init_args") or {}
        for callback in (callbacks if isinstance(callbacks, list) else [callbacks])
        if isinstance(callback, Mapping) and callback.get("class_path") == _AVERAGE
    ]
    return {**found, "callbacks": {_AVERAGE.rpartition(".")[2]: averages}}


def _differences(before: Any, now: Any, key: str) -> Iterator[Change]:
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        if before != now:
            yield Change(key, _brief(before), _brief(now))
        return
    if before.get("class_path") != now.get("class_path"):
        names = (_brief(config.get("class_path")) for config in (before, now))
        yield Change(f"{key}.class_path", *names)
        return
    for name in now:
        if name in before:
            yield from _differences(before[name], now[name], f"{key}.{name}")


def _decoded(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """Decode a checkpoint's config; one that is none, as a foreign file may have it, is empty."""
    decoded = decode_tree(stored, {})
    return decoded if isinstance(decoded, Mapping) else {}


def _brief(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
