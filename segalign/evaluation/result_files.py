"""The files of a result: numbers, a row for a table, rows by image, images, plots, and the page."""

import json
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any, Final

from torch import Tensor

from segalign.atomic import (
    make_directory,
    move_directory_into_place,
    recover_directory,
    remove_directory,
    storage_errors,
    temporary_sibling,
    write_bytes_atomic,
    write_text_atomic,
)
from segalign.evaluation.captions import CaptionRow, captions_digest
from segalign.evaluation.image_metric import EvaluationSetting, Findings
from segalign.evaluation.page_pictures import to_lossless
from segalign.evaluation.result import EvaluationResult, FailedImage, MetricResult, plain
from segalign.evaluation.result_folder import IMAGES_FOLDER, LINES_FILE, RESULT_FILE, image_name
from segalign.evaluation.result_page import ResultPage
from segalign.evaluation.result_plots import draw_lengths, draw_segments, to_png
from segalign.evaluation.result_table import compare

_LIBRARIES: Final = (
    "segalign", "torch", "torchvision", "torchmetrics", "torch-fidelity", "diffusers",
    "transformers", "open_clip_torch", "numpy",
)  # fmt: skip
_PLOTS: Final = {
    "by_length.png": ("mean scores by the length of the caption", draw_lengths),
    "by_segment.png": ("mean scores of segments by their number in the caption", draw_segments),
}


def make_result(
    setting: EvaluationSetting,
    findings: Mapping[str, Findings],
    model: Mapping[str, Any],
    *,
    num_counted: int,
    num_non_finite: int = 0,
    failures: Sequence[FailedImage] = (),
    seconds: float = 0.0,
) -> EvaluationResult:
    """Put a result together, with the time and the versions of libraries.

    Args:
        setting: What was evaluated.
        findings: What metrics found, by their names; those without numbers are left out.
        model: Description of the model, plain data; ``name`` is what tables call it.
        num_counted: Images that count.
        num_non_finite: Images that are not finite.
        failures: Images that could not be made.
        seconds: How long it took.
    """
    return EvaluationResult(
        model=dict(model),
        weights=setting.weights,
        num_captions=setting.plan.num_captions,
        images_per_caption=setting.plan.images_per_caption,
        batch_size=setting.plan.batch_size,
        eval_seed=setting.eval_seed,
        prompts=captions_digest(setting.rows),
        metrics={
            name: MetricResult(values=one.values, protocol=one.protocol, notes=tuple(one.notes))
            for name, one in findings.items()
            if one.values or one.notes
        },
        num_counted=num_counted,
        num_non_finite=num_non_finite,
        failures=tuple(failures),
        versions=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
    )


def write_result(
    folder: Path,
    result: EvaluationResult,
    rows: Sequence[CaptionRow],
    findings: Mapping[str, Findings],
    images: Mapping[int, Tensor] | None = None,
) -> list[Path]:
    """Write all files of a result, each whole or not at all; one rank calls it.

    ``result.json`` comes last: where it is, all others are. So that of an earlier test goes first,
    once there is room for the images, which are the largest.

    Args:
        folder: Where to; it is made if it is missing.
        result: The numbers.
        rows: The captions.
        findings: What metrics found.
        images: Those that the page shows, uint8 ``(3, H, W)`` by place, see
            `segalign.evaluation.kept_images.KeptImages`. They also become files, without loss.

    Returns:
        ``result.md``, ``images.jsonl``, ``result.html``, the plots that there is something for, the
        folder ``images`` if there are any, and ``result.json``.

    Raises:
        StorageError: If one cannot be written.
    """
    make_directory(folder)
    _replace_images(folder, images or {})
    per_image = {name: one for each in findings.values() for name, one in each.per_image.items()}
    texts = {
        "result.md": compare([result]).to_markdown(),
        LINES_FILE: image_lines(rows, per_image, result.images_per_caption),
    }
    plots: dict[str, bytes] = {}
    for name, (alt, draw) in _PLOTS.items():
        if (figure := draw(per_image)) is not None:
            plots[alt] = to_png(figure)
            write_bytes_atomic(folder / name, plots[alt])
    texts["result.html"] = ResultPage(result, rows, per_image, images or {}, plots).render()
    for name, text in texts.items():
        write_text_atomic(folder / name, text)
    result.save(folder / RESULT_FILE)
    drawn = [name for name, (alt, _) in _PLOTS.items() if alt in plots]
    kept = [IMAGES_FOLDER] if images else []
    return [folder / name for name in (*texts, *drawn, *kept, RESULT_FILE)]


def _replace_images(folder: Path, images: Mapping[int, Tensor]) -> None:
    """Write images as files by place, instead of all that an earlier test has left."""
    recover_directory(folder)
    target = folder / IMAGES_FOLDER
    temporary = temporary_sibling(target)
    try:
        make_directory(temporary)
        for place, image in images.items():
            write_bytes_atomic(temporary / image_name(place), to_lossless(image))
        with storage_errors(target):
            (folder / RESULT_FILE).unlink(missing_ok=True)
            if images:
                move_directory_into_place(temporary, target)
            elif target.exists():
                remove_directory(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def image_lines(
    rows: Sequence[CaptionRow], per_image: Mapping[str, Sequence[Any]], images_per_caption: int
) -> str:
    """Write what is known of each image, a line of strict JSON for each place.

    Args:
        rows: The captions.
        per_image: By name, a value for each place; None where the image does not count.
        images_per_caption: Images of each caption.
    """
    lines = []
    for place in range(len(rows) * images_per_caption):
        row = rows[place // images_per_caption]
        record = {
            "place": place,
            "sample_id": row["sample_id"],
            "image": place % images_per_caption,
            "caption": row["caption"],
            **{name: plain(values[place]) for name, values in per_image.items()},
        }
        lines.append(json.dumps(record, allow_nan=False))
    return "".join(f"{line}\n" for line in lines)


def _versions() -> dict[str, str]:
    found = {"python": python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
