"""Rewards by name: those of this package, and those that installed packages add.

A package adds a reward by an entry point of the group ``segalign.rewards`` that names a class, or a
function, of typed settings; what it makes has ``load() -> Reward``.
"""

from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from inspect import signature
from typing import Any

from jsonargparse import ArgumentParser

from segalign.errors import ConfigError
from segalign.rewards.protocol import Reward, RewardSource

GROUP = "segalign.rewards"
# As entry points, so that asking for one imports one.
_OWN: Mapping[str, str] = {
    "aesthetic": "segalign.rewards.aesthetic:Aesthetic",
    "clip_h": "segalign.rewards.zoo:ClipH",
    "denscore": "segalign.rewards.zoo:Denscore",
    "hpsv2": "segalign.rewards.zoo:Hpsv2",
    "hpsv2.1": "segalign.rewards.zoo:Hpsv21",
    "pickscore": "segalign.rewards.zoo:PickScore",
}


def available_rewards() -> list[str]:
    """List the names of all rewards, sorted; no package is imported for it."""
    return sorted({*_OWN, *entry_points(group=GROUP).names})


def describe_reward(name: str, **settings: Any) -> RewardSource:
    """Make the settings of a reward; nothing is read yet.

    Args:
        name: One of `available_rewards`.
        settings: Overrides of its defaults, as a config would have them, class paths included; or
            objects.

    Raises:
        ConfigError: If there is no such reward, two packages call theirs so, its package cannot be
            imported, or it does not take a setting or its value.
    """
    kind = _import(_entry_point(name))
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    try:
        if isinstance(kind, type):
            parser.add_class_arguments(kind, fail_untyped=False)
        else:
            parser.add_function_arguments(kind, fail_untyped=False)
        known = parser.instantiate(parser.parse_object(settings))
    except (ArgumentError, TypeError) as error:
        raise ConfigError(
            f"expected settings that the reward `{name}` takes; got: {_one_line(error)}; it takes "
            f"{', '.join(f'`{key}`' for key in signature(kind).parameters)}"
        ) from error
    source: RewardSource = kind(**dict(known))
    if not callable(getattr(source, "load", None)):
        raise ConfigError(
            f"expected the reward `{name}` to have `load()`; `{type(source).__name__}` has none; "
            "mend the package that adds it"
        )
    return source


def build_reward(name: str, **settings: Any) -> Reward:
    """Read a reward: `describe_reward`, and its ``load()``."""
    reward: Reward = describe_reward(name, **settings).load()
    return reward


@dataclass(frozen=True, kw_only=True)
class NamedReward:
    """A reward by its name.

    Args:
        name: ``clip_h``, ``pickscore``, ``hpsv2``, ``hpsv2.1``, ``denscore``, ``aesthetic``, or the
            name of one that an installed package adds.
        settings: Overrides of its defaults.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check name and settings."""
        describe_reward(self.name, **self.settings)

    def load(self) -> Reward:
        """See ``RewardSource``."""
        return build_reward(self.name, **self.settings)


def _entry_point(name: str) -> EntryPoint:
    found = {point.value: point for point in entry_points(group=GROUP, name=name)}
    if name in _OWN:
        found[_OWN[name]] = EntryPoint(name, _OWN[name], GROUP)
    if len(found) > 1:
        raise ConfigError(
            f"expected one reward of the name `{name}`; got {', '.join(sorted(found))}; remove a "
            "package, or name a class"
        )
    if not found:
        raise ConfigError(
            f"expected the name of a reward; got `{name}`; known are "
            f"{', '.join(f'`{known}`' for known in available_rewards())}"
        )
    return next(iter(found.values()))


def _import(point: EntryPoint) -> Any:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"expected the reward `{point.name}` in `{point.value}`; got: {_one_line(error)}; "
            "install its package again"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
