"""What ``grid`` and ``zip`` of a study vary, with short names for tables."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from segalign.launch.study import Axis, Level, Range
from segalign.launch.study_place import (
    Place,
    as_dataclass,
    as_list,
    as_mapping,
    brief,
    check_setting,
    near,
)

_RESERVED: Final = ("arm", "seed")
_UNNAMED_PARTS: Final = ("init_args", "class_path")
_ENDS: Final = ("low", "high")
_RANGE_KEYS: Final = (*_ENDS, "log")


def read_axes(grid: Any, zipped: Any, place: Place) -> tuple[Axis, ...]:
    """Read what a study varies: first the grid, then the zipped groups.

    Args:
        grid: Values by dotted key: a list, a mapping from labels to values, or a range.
        zipped: List of mappings from dotted keys to lists of one length.
        place: Where they are written.

    Raises:
        ConfigError: If they cannot be read.
    """
    keys_of = _keys(grid, zipped, place)
    all_keys = [key for keys in keys_of for key in keys]
    for key in all_keys:
        if all_keys.count(key) > 1:
            raise place.error("each key in one axis", f"`{key}` twice", "remove one of them")
    names = short_names(all_keys)
    axes = [_grid_axis(key, values, names[key], place) for key, values in (grid or {}).items()]
    axes += [_zip_axis(group, names, place) for group in zipped or ()]
    return tuple(axes)


def _keys(grid: Any, zipped: Any, place: Place) -> list[list[str]]:
    """Check the outer shape, and list the keys of each axis."""
    found = []
    if grid is not None:
        here = place.of("`grid`")
        found += [[key] for key in as_mapping(grid, here, "{model.init_args.omega: [0, 1]}")]
        if not grid:
            raise here.error("a key to vary", "nothing", "add one, or leave out `grid`")
    if zipped is not None:
        here = place.of("`zip`")
        for group in as_list(zipped, here, "[{trainer.max_steps: [40, 80]}]"):
            found.append(list(as_mapping(group, here, "{trainer.max_steps: [40, 80]}")))
            if not group:
                raise here.error("keys in each group", "none", "add some, or leave out `zip`")
    for keys in found:
        for key in keys:
            check_setting(key, place.of("`grid` or `zip`"))
    return found


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Name keys by their last part, or by as many parts as it takes to tell them apart."""
    parts = {key: _named_parts(key) for key in keys}
    names = {}
    for key, own in parts.items():
        others = [other for one, other in parts.items() if one != key]
        for count in range(1, len(own) + 1):
            name = ".".join(own[-count:])
            taken = [".".join(other[-count:]) for other in others]
            if name not in taken and name not in _RESERVED:
                break
        else:
            name = key
        names[key] = name
    return names


def _named_parts(key: str) -> list[str]:
    return [part for part in key.split(".") if part not in _UNNAMED_PARTS] or key.split(".")


def _grid_axis(key: str, values: Any, label: str, place: Place) -> Axis:
    here = place.of(f"`grid`, axis `{key}`")
    if isinstance(values, Mapping) and _is_range(values):
        return Axis(label=label, keys=(key,), range=_range(values, here))
    labelled = label_values(key, values, here)
    levels = [Level(label=name, settings={key: value}) for name, value in labelled]
    return Axis(label=label, keys=(key,), levels=tuple(levels))


def _is_range(values: Mapping[str, Any]) -> bool:
    """Tell a range, be it mistyped, from levels that are called so: its ends are numbers."""
    return values.keys() >= {*_ENDS} or any(
        isinstance(values.get(end), int | float) and not isinstance(values.get(end), bool)
        for end in _ENDS
    )


def _range(values: Mapping[str, Any], place: Place) -> Range:
    for key in as_mapping(values, place, "{low: 0, high: 1}"):
        if key not in _RANGE_KEYS:
            advice = f"{near(key, _RANGE_KEYS)}; levels need other names"
            raise place.error("`low`, `high` and `log` of a range", f"`{key}`", advice)
    for end in _ENDS:
        if end not in values:
            advice = "write both, or give a level another name"
            raise place.error("`low` and `high` of a range", f"no `{end}`", advice)
    ends = (values["low"], values["high"])
    are_integers = all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
    found = as_dataclass(Range, {"is_integer": are_integers, **values}, place, "{low: 0, high: 1}")
    if not found.low < found.high:
        raise place.error("`low` below `high`", f"{found.low:g} and {found.high:g}", "swap them")
    if found.log and found.low <= 0:
        raise place.error("`low` above 0 where `log` is true", f"{found.low:g}", "raise it")
    if found.is_integer and not (float(found.low).is_integer() and float(found.high).is_integer()):
        raise place.error("integers", f"{found.low:g} and {found.high:g}", "correct them")
    return found


def _zip_axis(group: Mapping[str, Any], names: Mapping[str, str], place: Place) -> Axis:
    label = "+".join(names[key] for key in group)
    here = place.of(f"`zip`, axis `{label}`")
    columns = {key: label_values(key, values, here, unique=False) for key, values in group.items()}
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        counts = ", ".join(f"{len(column)} of `{key}`" for key, column in columns.items())
        raise here.error("as many values of each key", counts, "make them equal in number")
    # Where one key names its levels, these names are enough.
    naming = [key for key, values in group.items() if isinstance(values, Mapping)] or list(group)
    levels = []
    for index in range(lengths.pop()):
        name = "/".join(dict.fromkeys(columns[key][index][0] for key in naming))
        settings = {key: column[index][1] for key, column in columns.items()}
        levels.append(Level(label=name, settings=settings))
    _check_unique([level.label for level in levels], here)
    return Axis(label=label, keys=tuple(group), levels=tuple(levels))


def label_values(
    key: str, values: Any, place: Place, *, unique: bool = True
) -> list[tuple[str, Any]]:
    """Give each value of a key a short label.

    Args:
        key: The dotted key.
        values: A list, or a mapping from labels to values.
        place: Where they are written.
        unique: Whether two labels that are alike are refused.

    Raises:
        ConfigError: If there is no value, or labels are alike.
    """
    if isinstance(values, Mapping) and values:
        if "class_path" in values:
            raise place.error(
                "a list of values, or a mapping from labels to values", "one class", "write a list"
            )
        for name in values:
            if name is None or isinstance(name, bool):
                raise place.error("labels of levels", f"`{name}`", "quote it")
        return [(short_value(key, name), value) for name, value in values.items()]
    listed = as_list(values, place, "[0.0, 0.3]")
    labels = [short_value(key, value) for value in listed]
    if len(set(labels)) < len(labels):
        labels = [short_value(key, value, in_full=True) for value in listed]
    if unique:
        _check_unique(labels, place)
    return list(zip(labels, listed, strict=True))


def _check_unique(labels: Sequence[str], place: Place) -> None:
    twice = next((label for label in labels if list(labels).count(label) > 1), None)
    if twice is not None:
        advice = "remove one of them, or name levels as `{label: value}`"
        raise place.error("levels that differ", f"{brief(twice)} twice", advice)


def short_value(key: str, value: Any, *, in_full: bool = False) -> str:
    """Show a value in a few characters: a class by its name, numbers without zeros.

    Args:
        key: Whose value it is; that of a ``class_path`` is a class.
        value: The value.
        in_full: Show what tells values apart that are alike in short.
    """
    if isinstance(value, Mapping) and "class_path" in value:
        name = str(value["class_path"]).rpartition(".")[2]
        settings = value.get("init_args") or {}
        return f"{name}({_pairs(settings)})" if in_full and settings else name
    if isinstance(value, Mapping):
        return f"{{{_pairs(value)}}}"
    if isinstance(value, list):
        return f"[{','.join(short_value('', one, in_full=in_full) for one in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return repr(value) if in_full else f"{value:g}"
    text = str(value)
    return text.rpartition(".")[2] if key.endswith("class_path") and not in_full else text


def _pairs(settings: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={short_value(str(name), value)}" for name, value in settings.items())


def axis_levels(axis: Axis) -> Sequence[Level]:
    """Return an axis's levels; of a range its two ends, which stand for what is between them."""
    if axis.range is None:
        return axis.levels
    number = int if axis.range.is_integer else float
    ends = [number(axis.range.low), number(axis.range.high)]
    return [
        Level(label=short_value("", end), settings=dict.fromkeys(axis.keys, end)) for end in ends
    ]
