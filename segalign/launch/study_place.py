"""Where in a study's file something is, and how its mistakes are named."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from segalign.commands.parsing import summarise
from segalign.errors import ConfigError
from segalign.launch.parser_words import plain_words

Settings = TypeVar("Settings")

# What a study itself decides, and what to write instead.
_NOT_SETTINGS = {
    "config": "layer files with `configs`",
    "seed_everything": "list seeds under `seeds`",
    "run_dir": "each run gets its own; choose where with `runs_folder`",
    "ckpt_path": "runs resume by themselves; what is tested is `test: {checkpoint: best}`",
}


@dataclass(frozen=True)
class Place:
    """A part of a study's file.

    Attributes:
        file: The file.
        inside: Which part, such as ``arm `plain```; empty is all of it.
    """

    file: Path
    inside: str = ""

    def __str__(self) -> str:
        return f"`{self.file}`" + (f", {self.inside}" if self.inside else "")

    def of(self, part: str) -> "Place":
        """Name a part of this part."""
        return Place(self.file, f"{self.inside}, {part}" if self.inside else part)

    def error(self, expected: str, got: str, advice: str) -> ConfigError:
        """Say what is wrong here, in one line."""
        return ConfigError(f"expected {expected} in {self}; got {got}; {advice}")


def near(name: str, known: Collection[str]) -> str:
    """Suggest the known name that was probably meant, else list all."""
    begun = [one for one in known if one.startswith(name)]
    close = get_close_matches(name, list(known), 1) or begun
    return f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}"


def as_mapping(value: Any, place: Place, example: str) -> Mapping[str, Any]:
    """Return a value that must be a mapping with text as keys."""
    if not isinstance(value, Mapping):
        raise place.error(f"a mapping such as `{example}`", brief(value), "write one")
    for key in value:
        if not isinstance(key, str):
            raise place.error("text as keys", f"`{key}`", "quote it")
    return value


def check_keys(content: Mapping[str, Any], known: Collection[str], place: Place) -> None:
    """Refuse keys that are not known."""
    for key in content:
        if key not in known:
            raise place.error("known keys", f"`{key}`", near(key, known))


def as_list(value: Any, place: Place, example: str) -> Sequence[Any]:
    """Return a value that must be a list with something in it."""
    if not isinstance(value, list) or not value:
        raise place.error(f"a list such as `{example}`", brief(value), "write one")
    return value


def as_files(value: Any, place: Place) -> tuple[Path, ...]:
    """Return config files, given one path or a list of them; each must be there."""
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise place.error("paths of config files", brief(value), "write `[configs/a.yaml]`")
    return check_files([Path(path) for path in paths], place)


def check_files(paths: Sequence[Path], place: Place) -> tuple[Path, ...]:
    """Refuse config files that are not there."""
    for path in paths:
        if not path.is_file():
            raise place.error(
                "config files that exist",
                f"`{path}`",
                "paths are relative to the working directory",
            )
    return tuple(paths)


def as_settings(value: Any, place: Place) -> dict[str, Any]:
    """Return values by dotted key; None is none."""
    content = as_mapping({} if value is None else value, place, "{trainer.max_steps: 40}")
    for key in content:
        check_setting(key, place)
    return dict(content)


def check_setting(key: str, place: Place) -> None:
    """Refuse a key that no variant may set, because the study decides it, or that is no key."""
    first = key.partition(".")[0]
    if first in _NOT_SETTINGS:
        raise place.error("settings of the run", f"`{key}`", _NOT_SETTINGS[first])
    if not all(key.split(".")):
        raise place.error("a dotted key such as `trainer.max_steps`", f"`{key}`", "correct it")


def as_dataclass(kind: type[Settings], value: Any, place: Place, example: str) -> Settings:
    """Build a dataclass from a mapping; its annotations say which values are good.

    Args:
        kind: The dataclass.
        value: What the file says.
        place: Where it says so.
        example: A good value, for messages.

    Raises:
        ConfigError: If a key is not known, or a value is of another type.
    """
    assert is_dataclass(kind)
    content = as_mapping(value, place, example)
    check_keys(content, [field.name for field in fields(kind)], place)
    # The parser takes a key without a value for its default.
    empty = [
        field.name
        for field in fields(kind)
        if field.default is not None and content.get(field.name, field) is None
    ]
    if empty:
        raise place.error(f"a value of `{empty[0]}`", "nothing", "give one, or leave it out")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--of", type=kind)
    try:
        parsed = parser.parse_object({"of": dict(content)})
    except ArgumentError as error:
        line = plain_words(summarise(str(error)).removeprefix("`of`: ").replace("`of.", "`"))
        raise ConfigError(f"expected settings that fit in {place}; {line}. Correct it.") from error
    return kind(**vars(parsed.of))


def brief(value: Any) -> str:
    """Show a value in a message."""
    if value is None or value in ([], {}):
        return "nothing"
    text = " ".join(str(value).split())
    return f"`{text if len(text) <= 60 else text[:57] + '...'}`"
