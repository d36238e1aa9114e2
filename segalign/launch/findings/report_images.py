"""What the test of a run has left for people to look at: images, and what is known of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from segalign.errors import DataError
from segalign.evaluation.result import EvaluationResult
from segalign.evaluation.result_folder import LINES_FILE, RESULT_FILE, image_files
from segalign.json_text import parse_json


@dataclass(frozen=True, kw_only=True)
class RunImages:
    """Images of a test, and its numbers.

    Attributes:
        result: Its numbers, and what they depend on.
        images: Files of the images that were kept, by place.
        size: Width and height of the first of them, in pixels.
        records: What is known of each of these images, by place; see
            `segalign.evaluation.result_files.image_lines`.
    """

    result: EvaluationResult
    images: Mapping[int, Path]
    size: tuple[int, int]
    records: Mapping[int, Mapping[str, Any]]

    def place(self, caption: int, number: int) -> int:
        """Return the place of an image: that of a caption, by the image's number."""
        return caption * self.result.images_per_caption + number


def test_folder(run_dir: Path) -> Path:
    """Name the folder of a run directory for the files of its test."""
    return run_dir / "evaluation" / "test"


def read_test(run_dir: Path) -> RunImages:
    """Read what the test of a run has left.

    Raises:
        DataError: If there is no test, it has kept no images, or its files cannot be read.
    """
    folder = test_folder(run_dir)
    if not (folder / RESULT_FILE).is_file():
        raise DataError("it has no test; put `test` in the `stages` of the study")
    result = EvaluationResult.load(folder / RESULT_FILE)
    images = image_files(folder)
    if not images:
        raise DataError(
            "its test has kept no images; set `num_pictures` of `EvaluationReport` above 0, and "
            "test it again"
        )
    records = _records(folder / LINES_FILE, images)
    return RunImages(
        result=result,
        images={place: path for place, path in images.items() if place in records},
        size=_size(next(iter(images.values()))),
        records=records,
    )


def is_whole(path: Path) -> bool:
    """Say whether a file is a picture that can be read to its end."""
    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as picture:
            return picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"expected a picture in `{path}`; it cannot be read; test the run again"
        ) from error


def _records(path: Path, places: Iterable[int]) -> dict[int, Mapping[str, Any]]:
    """Read the lines of some places; they stand in the order of places."""
    wanted = set(places)
    found: dict[int, Mapping[str, Any]] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file):
                if len(found) == len(wanted):
                    break
                if number in wanted:
                    found[number] = _record(line, number)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"expected what is known of images in `{path}`; it cannot be read; test the run again"
        ) from error
    return found


def _record(line: str, place: int) -> Mapping[str, Any]:
    record: dict[str, Any] = parse_json(line)
    if record["place"] != place:
        raise ValueError("places are not in their order")
    return {**record, "caption": str(record["caption"]), "sample_id": int(record["sample_id"])}
