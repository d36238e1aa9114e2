"""A source in the layout of DPG-Bench: prompts, one in each ``.txt``, and a CSV of questions."""

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from segalign.data.captions import check_caption, parse_caption_text
from segalign.data.faults import SampleFault
from segalign.data.sources import Members, to_json_member
from segalign.errors import ConfigError, DataError

QUESTIONS_NAME: Final = "dpg_bench.csv"
_PROMPTS_NAME: Final = "prompts"
_COLUMNS: Final = (
    "item_id",
    "proposition_id",
    "dependency",
    "category_broad",
    "category_detailed",
    "tuple",
    "question_natural_language",
)
_Row = Mapping[str, str]


class DpgSource:
    """The prompts of DPG-Bench with their questions.

    A sample's JSON holds ``caption``, ``id`` (the prompt's file name without ``.txt``, which is
    ``item_id``), ``prompt_set`` and ``questions``: for each proposition ``id``, ``dependency`` (ids
    of the questions that must be answered yes first), ``category_broad``, ``category_detailed``,
    ``tuple`` and ``question``. Every row counts; the official script leaves the first one out.

    Args:
        path: Folder with ``.txt`` files, or with such a folder ``prompts/``; or the CSV, whose
            column ``text`` is the prompt then.
        questions: The CSV; None looks for ``dpg_bench.csv`` in the folder and beside it.
        with_questions: False packs prompts without questions.

    Raises:
        ConfigError: If ``questions`` is given besides a CSV.
        DataError: If there are no prompts, no questions, or the CSV is none.
    """

    def __init__(
        self, path: Path, *, questions: Path | None = None, with_questions: bool = True
    ) -> None:
        if path.is_file() and questions is not None:
            raise ConfigError(
                f"expected `--questions` with a folder of prompts; `{path}` is a file, which is "
                "the questions itself; leave it out"
            )
        self._prompts = {} if path.is_file() else _prompt_files(path)
        table = path if path.is_file() else questions
        if with_questions and table is None:
            table = _find_questions(path)
        self._rows, digest = ({}, "") if table is None else _read_rows(table, with_questions)
        self._with_questions = with_questions
        self._has_files = bool(self._prompts)
        self._ids = sorted({*self._prompts, *self._rows} if with_questions else self._all_prompts())
        if not self._ids:
            raise DataError(f"`{table or path}` must hold prompts; it has none; check it")
        self._content = _digest_files(self._prompts.values(), digest)

    def __len__(self) -> int:
        return len(self._ids)

    def settings(self) -> dict[str, Any]:
        """See ``Source``."""
        return {"kind": "dpg", "questions": self._with_questions, "content": self._content}

    def origin(self, index: int) -> str:
        """See ``Source``."""
        return f"item {self._ids[index]}"

    def members(self, index: int) -> Members:
        """See ``Source``."""
        name = self._ids[index]
        rows = self._rows.get(name, [])
        fields: dict[str, Any] = {
            "caption": self._prompt(name, rows),
            "id": name,
            "prompt_set": "dpg",
        }
        if self._with_questions:
            fields["questions"] = _questions(rows)
        return [to_json_member(fields)]

    def _all_prompts(self) -> set[str]:
        return set(self._prompts) or set(self._rows)

    def _prompt(self, name: str, rows: Sequence[_Row]) -> str:
        if self._has_files:
            if name not in self._prompts:
                raise SampleFault("caption_missing", f"there is no `{name:.60}.txt`")
            return parse_caption_text(self._prompts[name].read_bytes())
        texts = {(row.get("text") or "").strip() for row in rows} - {""}
        if len(texts) > 1:
            raise SampleFault("questions_invalid", "the rows of the item differ in `text`")
        return check_caption(next(iter(texts), None))


def _prompt_files(folder: Path) -> dict[str, Path]:
    inner = folder / _PROMPTS_NAME
    files = {path.stem: path for path in (inner if inner.is_dir() else folder).glob("[!.]*.txt")}
    if not files:
        raise DataError(
            f"a folder of prompts, one in each `.txt`, or `{QUESTIONS_NAME}` was expected; "
            f"`{folder}` is neither; check the path"
        )
    return files


def _find_questions(folder: Path) -> Path:
    places = [folder / QUESTIONS_NAME, folder.resolve().parent / QUESTIONS_NAME]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise DataError(
            f"the questions `{QUESTIONS_NAME}` were expected in `{folder}` or beside it; there are "
            "none; name the file by `--questions`, or give `--questions none`"
        )
    return found


def _read_rows(path: Path, with_questions: bool) -> tuple[dict[str, list[_Row]], str]:
    """Return the rows of each item, and the digest of the file."""
    try:
        raw = path.read_bytes()
        table = csv.DictReader(io.StringIO(raw.decode("utf-8-sig"), newline=""), strict=True)
        needed = _COLUMNS if with_questions else ("item_id", "text")
        missing = [name for name in needed if name not in (table.fieldnames or ())]
        if missing:
            raise DataError(
                f"`{path}` must have the columns {', '.join(needed)}; it lacks "
                f"{', '.join(missing)}; fetch it again"
            )
        rows: dict[str, list[_Row]] = {}
        for row in table:
            rows.setdefault((row["item_id"] or "").strip(), []).append(row)
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        reason = getattr(err, "strerror", None) or getattr(err, "reason", None) or err
        raise DataError(
            f"a CSV file of questions was expected at `{path}`; got: {reason}; check the file"
        ) from err
    return rows, hashlib.sha256(raw).hexdigest()


def _questions(rows: Sequence[_Row]) -> list[dict[str, Any]]:
    """Return the questions of an item, in order of their ids.

    Raises:
        SampleFault: If there are none, or one is incomplete, occurs twice, or depends on none.
    """
    if not rows:
        raise SampleFault("questions_invalid", "the prompt has no questions")
    questions = {question["id"]: question for question in map(_question, rows)}
    if len(questions) != len(rows):
        raise SampleFault("questions_invalid", "a `proposition_id` occurs twice")
    for question in questions.values():
        unknown = [one for one in question["dependency"] if one not in questions]
        if unknown:
            detail = f"question {question['id']} depends on {unknown[0]}, which is none"
            raise SampleFault("questions_invalid", detail)
    return [questions[number] for number in sorted(questions)]


def _question(row: _Row) -> dict[str, Any]:
    has_all = all((row[name] or "").strip() for name in ("tuple", "question_natural_language"))
    if not has_all or None in row:  # DictReader keeps surplus cells under None
        raise SampleFault("questions_invalid", "a row lacks `tuple` or question, or has more cells")
    try:
        number = _integer(row["proposition_id"])
        dependency = [_integer(part) for part in row["dependency"].split(",")]
    except (AttributeError, TypeError, ValueError) as err:
        shown = (row["proposition_id"], row["dependency"])
        detail = f"`proposition_id` and `dependency` are {shown!r:.60}, not integers"
        raise SampleFault("questions_invalid", detail) from err
    return {
        "id": number,
        "dependency": [one for one in dependency if one != 0],
        "category_broad": (row["category_broad"] or "").strip(),
        "category_detailed": (row["category_detailed"] or "").strip(),
        "tuple": row["tuple"].strip(),
        "question": row["question_natural_language"].strip(),
    }


def _integer(text: str) -> int:
    """Read an integer; tables that passed through floats write 3 as ``3.0``."""
    return int(text.strip().removesuffix(".0"))


def _digest_files(paths: Any, table: str) -> str:
    digest = hashlib.sha256(table.encode())
    for path in sorted(paths):
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
