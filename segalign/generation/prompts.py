"""Prompts from the command line and from files, with the lines that hold none."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from segalign.errors import ConfigError

SEEDS = range(2**63)  # what a prompt's id and a seed may be


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    Attributes:
        sample_id: With a seed it alone decides the noise, and it names the files: the integer
            ``id`` of a line, or else the prompt's position.
        text: The prompt.
        label: ``id`` of a line that is not an integer; shown, and used for nothing else.
        seed: Seed of its only image; None takes the seeds of the command.
    """

    sample_id: int
    text: str
    label: str | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line of a prompts file that cannot be used.

    Attributes:
        number: Its number, from 1.
        reason: What was expected and what came.
    """

    number: int
    reason: str


def number_texts(texts: Sequence[str]) -> list[Prompt]:
    """Make prompts of texts, their positions being their ids."""
    return [Prompt(position, text) for position, text in enumerate(texts)]


def read_prompts(path: Path) -> tuple[list[Prompt], list[BadLine]]:
    """Read a prompts file.

    A line's position counts bad lines too, so that mending one changes no other image.

    Args:
        path: ``.jsonl`` with ``prompt`` or ``caption`` on each line, and optionally ``id`` and
            ``seed``; any other file holds one prompt a line.

    Returns:
        The prompts, and the lines that hold none.

    Raises:
        ConfigError: If the file cannot be read.
    """
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ConfigError(
            f"expected a prompts file at `{path}`; got: {error.strerror or error}. "
            "Correct `--prompt-file`."
        ) from error
    is_jsonl = path.suffix.lower() in (".jsonl", ".ndjson")
    prompts: list[Prompt] = []
    bad: list[BadLine] = []
    taken: set[int] = set()
    for position, line in enumerate(_lines(content)):
        try:
            prompt = _parse(line, position, is_jsonl=is_jsonl)
            if prompt.sample_id in taken:
                raise ValueError(f"expected an id of its own; got {prompt.sample_id} again")
        except ValueError as error:
            bad.append(BadLine(position + 1, str(error)))
            continue
        taken.add(prompt.sample_id)
        prompts.append(prompt)
    return prompts, bad


def _lines(content: bytes) -> Iterator[bytes]:
    """Split at line feeds alone; what ends the last line starts no further one."""
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    yield from (line.removesuffix(b"\r") for line in lines)


def _parse(line: bytes, position: int, *, is_jsonl: bool) -> Prompt:
    """Read one line.

    Raises:
        ValueError: If it holds no prompt.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8; got byte {line[error.start]:#04x}") from error
    if not text.strip():
        raise ValueError("expected a prompt; got an empty line")
    return _parse_record(text, position) if is_jsonl else Prompt(position, text)


def _parse_record(text: str, position: int) -> Prompt:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON; got: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with `prompt`; got {_kind(record)}")
    key = "prompt" if "prompt" in record else "caption"
    if key not in record:
        raise ValueError("expected `prompt` or `caption`; got neither")
    prompt = record[key]
    if not isinstance(prompt, str):
        raise ValueError(f"expected `{key}` to be a string; got {_kind(prompt)}")
    if not prompt.strip():
        raise ValueError(f"expected text in `{key}`; got none")
    name = record.get("id")
    sample_id, label = position, None
    if _is_integer(name):
        sample_id = name
    elif name is not None:
        label = str(name)
    if sample_id not in SEEDS:
        raise ValueError(f"expected `id` in [0, 2^63); got {sample_id}")
    seed = record.get("seed")
    if seed is not None and not (_is_integer(seed) and seed in SEEDS):
        raise ValueError(f"expected `seed` to be an integer in [0, 2^63); got {seed!r:.40}")
    return Prompt(sample_id, prompt, label, seed)


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    """Name the JSON type of a value."""
    names = {str: "a string", bool: "a boolean", dict: "an object", list: "a list"}
    return "null" if value is None else names.get(type(value), "a number")
