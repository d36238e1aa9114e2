"""The prompt sets that ``shards pack`` can pack: captions without images."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from jsonargparse import ArgumentParser, Namespace

from segalign.commands.pack_sources import Kind, with_packing

if TYPE_CHECKING:
    from segalign.data.sources import Source

_NO_QUESTIONS: Final = "none"


def _dpg_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="the layout of DPG-Bench: a folder of prompts, one in each `.txt`, and "
        "`dpg_bench.csv` with their questions"
    )
    parser.add_argument(
        "source", type=str, help="folder of prompts, or the CSV, whose `text` is the prompt then"
    )
    parser.add_argument(
        "--questions",
        type=str | None,
        help="the CSV, or `none`; default: `dpg_bench.csv` in the folder or beside it",
    )
    return with_packing(parser, images=False)


def _prompts_parser(description: str, prompt_key: str, id_key: tuple[str, ...]) -> ArgumentParser:
    parser = ArgumentParser(description=description)
    parser.add_argument(
        "source", type=str, help="JSON array of objects, or .jsonl with one on each line"
    )
    parser.add_argument(
        "--prompt-key", type=str, default=prompt_key, help="field that is the prompt"
    )
    parser.add_argument(
        "--id-key",
        type=str,
        nargs="+",
        default=list(id_key),
        help="fields that make the id; without them it is the place in the file",
    )
    return with_packing(parser, images=False)


def _dpg_source(options: Namespace) -> "Source":
    from segalign.data.dpg_source import DpgSource

    if options.questions == _NO_QUESTIONS:
        return DpgSource(Path(options.source), with_questions=False)
    questions = None if options.questions is None else Path(options.questions)
    return DpgSource(Path(options.source), questions=questions)


def _prompt_source(prompt_set: str, options: Namespace) -> "Source":
    from segalign.data.prompt_sources import PromptSource

    return PromptSource(
        Path(options.source),
        prompt_set=prompt_set,
        prompt_key=options.prompt_key,
        id_key=tuple(options.id_key),
    )


def _prompt_kind(name: str, help_: str, prompt_key: str, id_key: tuple[str, ...]) -> Kind:
    return Kind(
        help_,
        partial(_prompts_parser, help_, prompt_key, id_key),
        partial(_prompt_source, name),
    )


PROMPT_KINDS: Final[Mapping[str, Kind]] = {
    "dpg": Kind("prompts and questions of DPG-Bench", _dpg_parser, _dpg_source),
    "detailmaster": _prompt_kind(
        "detailmaster",
        "JSON of DetailMaster: prompts with attributes",
        "polished_prompt",
        ("dataset_target", "image_id"),
    ),
    "lpg": _prompt_kind("lpg", "JSON of LPG-Bench: long prompts", "prompt", ("id",)),
    "prompts": _prompt_kind("prompts", "JSON of any other prompts", "prompt", ("id",)),
}
