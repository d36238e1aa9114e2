"""Tables of results, one row for each; numbers that must not be compared are refused."""

import math
from collections.abc import Mapping, Sequence
from itertools import chain, count
from typing import Any, Final

from segalign.errors import ConfigError, DataError
from segalign.evaluation.result import EvaluationResult, short
from segalign.metrics.metric_protocol import protocol_digest
from segalign.metrics.report_table import ReportTable

# What tables call the numbers that papers report; in this order. A ``*`` is the name of a reward.
_HEADINGS: Final[Mapping[str, str]] = {
    "fid": "FID",
    "inception_score": "IS",
    "kid": "KID",
    "denscore/*": "Denscore",
    "denscore_o/*": "Denscore-O",
    "reward/*": "",
    "retrieval/r_at_1": "R@1",
    "lpips_diversity": "LPIPS div",
    "lpips_drift": "LPIPS drift",
    "attributes": "attributes",
    "attributes/past_77": "attributes past 77",
}
# Of columns that are no values.
_OTHER_HEADINGS: Final = ("model", "images")


def compare(results: Sequence[EvaluationResult], sources: Sequence[str] = ()) -> ReportTable:
    """Set out results side by side.

    Args:
        results: At least one.
        sources: What errors call each of them; numbers by default.

    Returns:
        A table with a row for each. Columns are the numbers that at least one has; of those with
        several values, such as scores by length, the main ones. Its title holds the digest of all
        protocols.

    Raises:
        ConfigError: If there is no result.
        DataError: If two of them differ in prompts, in the number of images, or in the protocol of
            a metric that both have.
    """
    if not results:
        raise ConfigError("expected at least one result for a table; got none; name a file")
    names = list(sources) or [f"result {number}" for number in range(1, len(results) + 1)]
    merged: dict[str, Any] = {"metrics": {}}
    origin: dict[str, str] = {}
    for result, source in zip(results, names, strict=True):
        _merge(merged, origin, result.conditions, source)
    columns = _columns(results)
    is_short = [one.num_counted < one.num_captions * one.images_per_caption for one in results]
    own = _OTHER_HEADINGS if any(is_short) else _OTHER_HEADINGS[:1]
    headings = [*own, *columns]
    return ReportTable(
        f"{results[0].num_captions} captions x {results[0].images_per_caption}, prompts "
        f"{short(results[0].prompts)}, protocol {short(protocol_digest(merged))}",
        headings,
        [_row(one, columns, with_images=any(is_short)) for one in results],
    )


def _row(result: EvaluationResult, columns: Mapping[str, str], *, with_images: bool) -> list[str]:
    images = [f"{result.num_counted}"] if with_images else []
    values = result.values
    return [_cell(result.name), *images, *(number(values.get(one)) for one in columns.values())]


def number(value: float | None) -> str:
    """Show a number for people; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    digits = 4 if abs(value) >= 1 else 3
    return f"{value:.{digits}g}" if abs(value) < 1e4 else f"{value:.0f}"


def headline(result: EvaluationResult) -> dict[str, float]:
    """Return the numbers that a table shows, by heading."""
    return {head: result.values[name] for head, name in _columns([result]).items()}


def _columns(results: Sequence[EvaluationResult]) -> dict[str, str]:
    """Choose the columns: headings, and the names of their values."""
    names = list(dict.fromkeys(name for one in results for name in one.values))
    columns: dict[str, str] = {}
    for pattern, heading in _HEADINGS.items():
        stem, star, _ = pattern.partition("*")
        found = [n for n in names if (n.startswith(stem) and "/" not in n[len(stem) :])]
        for name in found if star else [n for n in names if n == pattern]:
            own = name[len(stem) :] if star else ""
            joined = f"{heading} ({own})" if heading and own and len(found) > 1 else heading or own
            columns[_free(joined, name, columns)] = name
    shown = {*columns.values()}
    # Of other metrics, the number that has the metric's name.
    main = {
        name for one in results for name, metric in one.metrics.items() if name in metric.values
    }
    for name in (one for one in names if one in main - shown):
        columns[_free(name, name, columns)] = name
    return columns


def _free(heading: str, name: str, taken: Mapping[str, str]) -> str:
    """Return a heading that no other column has: the value's own name where the first one is taken.

    A reward may be called like a metric.
    """
    numbered = (f"{name} ({number})" for number in count(2))
    cells = (_cell(text) for text in chain((heading, name), numbered))
    return next(cell for cell in cells if cell not in taken and cell not in _OTHER_HEADINGS)


def _cell(text: str) -> str:
    """Make text safe in a Markdown table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _merge(
    merged: dict[str, Any], origin: dict[str, str], conditions: Mapping[str, Any], source: str
) -> None:
    """Add a result's conditions to those of others.

    Raises:
        DataError: If one differs.
    """
    general = {name: one for name, one in conditions.items() if name != "metrics"}
    for name, one in {**general, **conditions["metrics"]}.items():
        place = merged if name in general else merged["metrics"]
        path = name if name in general else f"metrics.{name}"
        if name in place:
            difference = _difference(place[name], one, path)
            if difference is not None:
                _refuse(difference, origin[path], source)
        else:
            place[name], origin[path] = one, source


def _refuse(difference: tuple[str, str, str], first: str, second: str) -> None:
    where, one, other = difference
    raise DataError(
        f"expected results of one protocol in a table; got `{where}` {one} in {first} and {other} "
        f"in {second}; evaluate both alike, or make two tables"
    )


def _difference(first: Any, second: Any, path: str) -> tuple[str, str, str] | None:
    """Return path and values of the first field that differs, in the order of names."""
    if isinstance(first, dict) and isinstance(second, dict):
        for name in sorted({*first, *second}):
            found = _difference(first.get(name, ...), second.get(name, ...), f"{path}.{name}")
            if found is not None:
                return found
        return None
    return None if first == second else (path, _shown(first), _shown(second))


def _shown(value: Any) -> str:
    if value is ...:
        return "missing"
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."
