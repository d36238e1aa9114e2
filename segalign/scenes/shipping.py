"""Packing of the tiny base's weights, with where they come from."""

import csv
import json
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from segalign.atomic import write_text_atomic
from segalign.errors import DataError
from segalign.rewards.clip_reward import ClipReward
from segalign.run_directory import checkpoint_step, resolve_checkpoint
from segalign.scenes.base import (
    GENERATOR_PREFIXES,
    PREFERENCE,
    SCORER_PREFIXES,
    TEXT_PREFIXES,
    ScenesBase,
)
from segalign.scenes.evaluation import score_bundle
from segalign.scenes.generated import GeneratedSceneSource
from segalign.scenes.held_out import HELD_OUT, HELD_OUT_PREFIXES, load_held_out
from segalign.scenes.pairs import make_pair
from segalign.scenes.samples import make_sample
from segalign.scenes.scorer_checks import answer_accuracy, pair_margins
from segalign.scenes.scorers import ScenesScorer
from segalign.scenes.weights import fill_weights, load_compact, read_weights, save_compact
from segalign.text.segmenter import SentenceSegmenter
from segalign.text.settings import TextEncoding
from segalign.text.tokenizer import clip_tokenizer, word_token_ids

# Scenes of the final score: a stream that no training run uses.
_SCORE_STREAM = 2**40 + 1
_NUM_SCORED = 256
_PROVENANCE = "provenance.json"


def pack_base(scorer: Path, generator: Path, folder: Path) -> str:
    """Write ``scorer``, ``text_model`` and ``generator`` weights and ``provenance.json``.

    What the folder says of a held-out scorer and of a preference model is kept.

    Args:
        scorer: Run of the scorer.
        generator: Run of the generator; its text model is kept if it trained one.
        folder: Target.

    Returns:
        One line about what was written.
    """
    rows = used_token_ids()
    text_run = generator if _trains_text(generator) else scorer
    parts = {
        "scorer": (scorer, SCORER_PREFIXES),
        "text_model": (text_run, TEXT_PREFIXES),
        "generator": (generator, GENERATOR_PREFIXES),
    }
    for part, (run, prefixes) in parts.items():
        state = read_weights(str(run), part, prefixes, "3x3")
        assert state is not None
        save_compact(state, folder / f"{part}.safetensors", rows)
    accuracy = score_base(folder)
    provenance = {
        "runs": {"scorer": describe_run(scorer), "generator": describe_run(generator)},
        **_machine(),
        "oracle": {"captions": _NUM_SCORED, "length": "short", **accuracy},
    }
    if (folder / _PROVENANCE).is_file():
        earlier = _read_provenance(folder)
        provenance |= {key: earlier[key] for key in (HELD_OUT, PREFERENCE) if key in earlier}
    _write_provenance(folder, provenance)
    return f"{folder}: attributes {accuracy['attributes']:.3f} on short captions"


def pack_held_out(run: Path, folder: Path) -> str:
    """Write the held-out scorer's weights beside those of the tiny base, with their provenance.

    Args:
        run: Run of the held-out scorer.
        folder: Folder that `pack_base` wrote.

    Returns:
        One line about what was written.

    Raises:
        DataError: If the folder does not hold a base.
    """
    return _pack_beside(HELD_OUT, HELD_OUT_PREFIXES, run, folder, score_held_out)


def pack_preference(run: Path, folder: Path) -> str:
    """Write the preference model's weights beside those of the tiny base, with their provenance.

    Args:
        run: Run of the preference model, which started from the base's scorer.
        folder: Folder that `pack_base` wrote.

    Returns:
        One line about what was written.

    Raises:
        DataError: If the folder does not hold a base.
    """
    return _pack_beside(PREFERENCE, SCORER_PREFIXES, run, folder, score_preference)


def _pack_beside(
    part: str,
    prefixes: Sequence[str],
    run: Path,
    folder: Path,
    score: Callable[[Path], dict[str, float]],
) -> str:
    """Write a part's weights beside the base's; measure and record them."""
    provenance = _read_provenance(folder)
    state = read_weights(str(run), part, prefixes, "3x3")
    assert state is not None
    save_compact(state, folder / f"{part}.safetensors", used_token_ids())
    scores = score(folder)
    provenance[part] = {"run": describe_run(run), **_machine(), "scores": scores}
    _write_provenance(folder, provenance)
    return f"{folder}: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items())


def score_preference(folder: Path) -> dict[str, float]:
    """Measure the written preference model on pairs that no training run uses.

    Returns:
        Shares of pairs with long captions that it ranks right by the mean of segments (``pairs``),
        and by the first 77 tokens (``pairs_whole``).
    """
    scorer = ScenesScorer(weights="random").load()
    state = load_compact(folder / f"{PREFERENCE}.safetensors")
    scale = {k: v.reshape(()) for k, v in state.items() if k == "logit_scale"}
    fill_weights(scorer.model, state | scale, str(folder))
    pairs = [make_pair("3x3", _SCORE_STREAM, index) for index in range(_NUM_SCORED)]
    readings = {"pairs": SentenceSegmenter(), "pairs_whole": None}
    return {
        name: round(
            float((pair_margins(ClipReward(scorer, segmenter=one), pairs) > 0).float().mean()), 4
        )
        for name, one in readings.items()
    }


def score_held_out(folder: Path) -> dict[str, float]:
    """Measure the written held-out scorer on scenes that no training run uses.

    Returns:
        Shares of right answers to one-fact questions on ``clean``, ``noisy`` (deviation 0.15) and
        ``drawn`` pictures; of ``pairs`` with long captions that it ranks right, by the mean of
        segments; of those that the first scorer ranks right (``first_pairs``); and of those that
        both rank alike (``agreement``).
    """
    scorer = load_held_out("3x3", "random")
    fill_weights(scorer.model, load_compact(folder / f"{HELD_OUT}.safetensors"), str(folder))
    held_out = ClipReward(scorer, segmenter=SentenceSegmenter())
    first = ClipReward(ScenesScorer().load(), segmenter=SentenceSegmenter())
    rendered = [make_sample("3x3", _SCORE_STREAM, index) for index in range(_NUM_SCORED)]
    source = GeneratedSceneSource(_NUM_SCORED, seed=_SCORE_STREAM, share=1.0)
    drawn = [source.sample(index) for index in range(_NUM_SCORED)]
    pairs = [make_pair("3x3", _SCORE_STREAM, index) for index in range(_NUM_SCORED)]
    right, first_right = (pair_margins(one, pairs) > 0 for one in (held_out, first))
    scores = {
        "clean": answer_accuracy(held_out, rendered),
        "noisy": answer_accuracy(held_out, rendered, noise=0.15),
        "drawn": answer_accuracy(held_out, drawn),
        "pairs": float(right.float().mean()),
        "first_pairs": float(first_right.float().mean()),
        "agreement": float((right == first_right).float().mean()),
    }
    return {name: round(value, 4) for name, value in scores.items()}


def used_token_ids() -> Tensor:
    """List the token ids that occur in scene captions, special tokens included, sorted."""
    tokenizer = clip_tokenizer()
    used = {int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)}
    for index in range(2000):
        used.update(word_token_ids(make_sample("3x3", 0, index).caption, tokenizer))
    return torch.tensor(sorted(used))


def score_base(folder: Path) -> dict[str, float]:
    """Score the written weights on short captions that they read whole, by the oracle."""
    base = ScenesBase(generator="random", text_model="random").load()
    fill_weights(base.unet, load_compact(folder / "generator.safetensors"), str(folder))
    text_model = base.text_models.text_model
    fill_weights(text_model, load_compact(folder / "text_model.safetensors"), str(folder))
    samples = [make_sample("3x3", _SCORE_STREAM, i, length="short") for i in range(_NUM_SCORED)]
    score = score_bundle(base, TextEncoding(kind="truncated", mask_padding=True), samples)
    return {name: round(value, 4) for name, value in score.accuracies().items()}


def describe_run(run: Path) -> dict[str, Any]:
    """Summarise a run: config, seed, steps, validation curve, and the run it started from."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    settings = config["model"]["init_args"]
    earlier = _earlier_scorer(settings) or _earlier_generator(settings)
    return {
        **({"starts_from": describe_run(Path(earlier))} if earlier else {}),
        "model": config["model"],
        "data": config["data"],
        "seed": config["seed_everything"],
        "steps": checkpoint_step(resolve_checkpoint(run)),
        "curve": _validation_curve(run / "logs" / "metrics.csv"),
    }


def _machine() -> dict[str, Any]:
    return {
        "machine": {"processor": _processor(), "python": platform.python_version()},
        "torch": torch.__version__,
    }


def _read_provenance(folder: Path) -> dict[str, Any]:
    try:
        provenance: dict[str, Any] = json.loads((folder / _PROVENANCE).read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"expected the tiny base in `{folder}`; it has no readable `{_PROVENANCE}`; run "
            "`scenes pack-base` first"
        ) from error
    return provenance


def _write_provenance(folder: Path, provenance: dict[str, Any]) -> None:
    write_text_atomic(folder / _PROVENANCE, json.dumps(provenance, indent=1) + "\n")


def _earlier_scorer(settings: dict[str, Any]) -> str | None:
    """Name the run that a scorer started from."""
    source = ((settings.get("scorer") or {}).get("init_args") or {}).get("weights", "random")
    return None if source in ("random", "shipped") else str(source)


def _earlier_generator(settings: dict[str, Any]) -> str | None:
    """Name the run that a generator started from."""
    source = settings.get("base", {}).get("init_args", {}).get("generator", "random")
    return None if source in ("random", "shipped") else str(source)


def _validation_curve(file: Path) -> list[dict[str, float]]:
    wanted = ("step", "val/dense_accuracy", "val/attributes", "val/objects")
    with file.open(newline="", encoding="utf-8") as lines:
        rows = [{k: float(row[k]) for k in wanted if row.get(k)} for row in csv.DictReader(lines)]
    return [row for row in rows if len(row) > 1]


def _trains_text(run: Path) -> bool:
    config = yaml.safe_load((run / "config.yaml").read_text())
    return bool(config["model"]["init_args"].get("train_text_model"))


def _processor() -> str:
    """Name the kind of processor, never the machine."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.machine()
