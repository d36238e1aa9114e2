"""A folder of generated images that a killed command can go on with.

Every PNG says how it was made. One that is there was written whole: it is kept if this command
would make the same one, and never replaced by another without being asked.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from segalign.atomic import make_directory, write_bytes_atomic, write_text_atomic
from segalign.errors import ConfigError
from segalign.generation.own_files import (
    FINGERPRINT,
    RECORDS_FILE,
    check_own,
    image_files,
    image_name,
    read_metadata,
    remove_stale,
)
from segalign.generation.prompts import Prompt
from segalign.json_text import parse_json
from segalign.pictures import to_uint8

# A prompt is shortened in a picture's metadata only; readers of PNG give up on huge texts.
_MAX_PROMPT_IN_PNG = 65_536
_UNPRINTABLE = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """What images have in common that one command makes.

    Attributes:
        checkpoint: Digest of the weights and their settings.
        weights: ``raw`` or ``ema``.
        sampler: Name of the sampler.
        steps: Inference steps.
        guidance: Factor of classifier-free guidance.
        dtype: What the networks compute in: that of their weights, several joined by ``+``, or the
            one that was asked for.
    """

    checkpoint: str
    weights: str
    sampler: str
    steps: int
    guidance: float
    dtype: str


@dataclass(frozen=True, slots=True)
class ImageJob:
    """One image to make.

    Attributes:
        prompt: Its prompt.
        seed: Its seed.
    """

    prompt: Prompt
    seed: int

    @property
    def file(self) -> str:
        """Name of the file: numbers alone, never text of the prompt."""
        return image_name(self.prompt.sample_id, self.seed)


class ImageFolder:
    """Images of one set of settings; one process at a time: see ``lock_folder``.

    Args:
        path: The folder; it is made if it is missing.
        settings: What all its images have in common.

    Raises:
        ConfigError: If it holds images of other settings, or files of other origin by our names.
        StorageError: If it cannot be written.
    """

    def __init__(self, path: Path, settings: ImageSettings) -> None:
        make_directory(path)
        check_own(path)
        remove_stale(path)
        self.path = path
        self.settings = settings
        self._stored = {file.name: read_metadata(file) for file in image_files(path)}
        expected = {name: str(value) for name, value in asdict(settings).items()}
        for name, stored in self._stored.items():
            for key, value in expected.items():
                if stored and stored.get(key) != value:
                    raise _refusal(path, f"`{name}` was made with {key} {stored.get(key)}", value)

    def missing(self, jobs: Iterable[ImageJob]) -> list[ImageJob]:
        """Return the jobs whose images are still to be made.

        Raises:
            ConfigError: If an image of the name is there that shows another prompt.
        """
        missing = []
        for job in jobs:
            stored = self._stored.get(job.file)
            if not stored:
                missing.append(job)
            elif stored.get(FINGERPRINT) != self._fingerprint(job):
                raise _refusal(
                    self.path, f"`{job.file}` shows another prompt", f"{job.prompt.text!r:.40}"
                )
        return missing

    def write(self, job: ImageJob, image: Tensor) -> None:
        """Write one image, whole or not at all.

        Args:
            job: What it shows.
            image: Float in [0, 1], ``(3, H, W)``.
        """
        metadata = {
            "prompt": printable(job.prompt.text[:_MAX_PROMPT_IN_PNG]),
            "sample_id": str(job.prompt.sample_id),
            "seed": str(job.seed),
            **{name: str(value) for name, value in asdict(self.settings).items()},
            FINGERPRINT: self._fingerprint(job),
        }
        info = PngInfo()
        for key, text in metadata.items():
            info.add_text(key, text)
        buffer = io.BytesIO()
        Image.fromarray(to_uint8(image)).save(buffer, "PNG", pnginfo=info)
        write_bytes_atomic(self.path / job.file, buffer.getvalue())

    def write_records(self, jobs: Sequence[ImageJob]) -> list[dict[str, Any]]:
        """Write ``images.jsonl``: the images of these jobs that are there, and earlier ones.

        Returns:
            The records, by sample and seed.
        """
        records = self._earlier_records()
        for job in jobs:
            records[job.file] = {
                "file": job.file,
                "sample_id": job.prompt.sample_id,
                "id": job.prompt.label,
                "seed": job.seed,
                "prompt": job.prompt.text,
                **asdict(self.settings),
            }
        there = [record for file, record in records.items() if (self.path / file).is_file()]
        there.sort(key=lambda record: (record["sample_id"], record["seed"]))
        text = "".join(json.dumps(record) + "\n" for record in there)
        write_text_atomic(self.path / RECORDS_FILE, text)
        return there

    def _earlier_records(self) -> dict[str, dict[str, Any]]:
        """Read the records of earlier commands; lines that are none are left out."""
        records: dict[str, dict[str, Any]] = {}
        file = self.path / RECORDS_FILE
        for line in file.read_bytes().splitlines() if file.is_file() else []:
            try:
                record = parse_json(line)
                own = ImageJob(Prompt(int(record["sample_id"]), record["prompt"]), record["seed"])
                if record["file"] == own.file:
                    records[own.file] = record
            except (ValueError, KeyError, TypeError):
                continue
        return records

    def _fingerprint(self, job: ImageJob) -> str:
        content = [asdict(self.settings), job.prompt.sample_id, job.seed, job.prompt.text]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def printable(text: str) -> str:
    """Replace what UTF-8 files or PNG texts cannot hold: NUL and lone surrogates."""
    return _UNPRINTABLE.sub("\ufffd", text)


def _refusal(path: Path, found: str, expected: str) -> ConfigError:
    return ConfigError(
        f"expected `{path}` to be empty or to hold images of the same settings; {found}, not "
        f"{expected}. Choose another `--out`, or start anew with `--overwrite`."
    )
