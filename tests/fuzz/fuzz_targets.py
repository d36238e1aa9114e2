"""Readers of foreign bytes as functions of bytes; what they may raise is a user's error alone.

Each target may raise ``SegalignError`` or ``SampleFault``; anything else, a failed assertion
included, is a finding. Its seeds are good files, from which a fuzzer starts.
"""

import functools
import hashlib
import io
import json
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import save
from transformers import CLIPTextConfig, CLIPTextModel

from segalign.data.captions import parse_caption_text, parse_json_object, parse_preference
from segalign.data.faults import SampleFault
from segalign.data.json_items import JsonItems
from segalign.data.manifest import MANIFEST_NAME, ShardEntry, load_manifest, write_manifest
from segalign.data.order import BatchPlan, EpochOrder
from segalign.data.reader import IndexedShardReader
from segalign.data.tarfiles import ShardWriter, index_shard
from segalign.data.transforms import DecodeRow
from segalign.errors import SegalignError
from segalign.formats.official_lora import (
    match_official_lora,
    official_targets,
    read_official_lora,
)
from segalign.formats.peft_lora import load_diffusers_lora, save_diffusers_lora
from segalign.generation.prompts import read_prompts
from segalign.launch.study_file import load_study
from segalign.run_directory import META_FILE, STATE_FILE, describe_files
from segalign.run_format import load_checkpoint, save_checkpoint
from segalign.text.caption_plan import plan_caption
from segalign.text.clip_tower import ClipTower
from segalign.text.long_segments import cut_segment
from segalign.text.segmenter import OfficialSegmenter, SentenceSegmenter
from segalign.text.special_tokens import SpecialTokenPolicy
from segalign.text.tokenizer import clip_tokenizer

ALLOWED = (SegalignError, SampleFault)
MEMORY = Path("/dev/shm")
TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


class Target(NamedTuple):
    """A reader to be fuzzed.

    Attributes:
        read: Reads some bytes.
        seeds: Makes good inputs.
    """

    read: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]

    def try_on(self, data: bytes) -> None:
        """Read, and let pass what a reader may raise."""
        try:
            self.read(data)
        except ALLOWED:
            return


@functools.cache
def place() -> Path:
    """Return a folder of this process."""
    # In memory, where syncing costs nothing.
    is_there = MEMORY.is_dir() and tempfile.tempdir is None
    found = tempfile.TemporaryDirectory(prefix="fuzz-", dir=MEMORY if is_there else None)
    _KEPT.append(found)
    return Path(found.name)


_KEPT: list[tempfile.TemporaryDirectory] = []


def written(name: str, data: bytes) -> Path:
    path = place() / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


# Captions.


@functools.cache
def tower() -> ClipTower:
    config = CLIPTextConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return ClipTower(CLIPTextModel(config).eval().requires_grad_(False), clip_tokenizer())


def split_caption(data: bytes) -> None:
    """Split a caption: spans tile it, texts join to it, pieces fit, the token budget is kept."""
    caption = data[:20_000].decode("utf-8", "surrogateescape")
    segments = SentenceSegmenter().split(caption)
    for split in (segments, OfficialSegmenter().split(caption)):
        assert split
        assert (split[0].start, split[-1].end) == (0, len(caption))
        assert all(one.end == other.start for one, other in pairwise(split))
    assert "".join(segment.text for segment in segments) == caption
    assert all(caption[one.start : one.end] == one.text for one in segments)
    longest = max(segments, key=lambda segment: len(segment.text))
    pieces = cut_segment(longest, 12, tower().count_word_tokens)
    assert "".join(piece.text for piece in pieces) == longest.text
    assert (pieces[0].start, pieces[-1].end) == (longest.start, longest.end)
    assert all(one.end == other.start for one, other in pairwise(pieces))
    for piece in pieces:
        assert len(piece.text.strip()) <= 1 or tower().count_word_tokens(piece.text) <= 12
    for over in ("cut", "proportional"):
        plan = plan_caption(
            segments,
            tower(),
            policy=SpecialTokenPolicy(),
            token_budget=40,
            long_segments="cut_further",
            over_budget=over,
        )
        assert 0 < sum(len(tokens.positions) for tokens in plan.tokens) <= 40


def caption_seeds() -> list[bytes]:
    texts = [
        "A red cat sits on a mat. It looks at Dr. Smith, with 3.5 l of milk! Why? \u201cYes.\u201d",
        "1. a cat\n2. a dog\n- (A bird.) [3] e.g. approx. 5 m. High\u2026 Low",
        "\u732b\u304c\u3044\u308b\u3002\u300c\u72ac\u3060\u3002\u300d\u3068\u8a00\u3046\u3002",
        "word " * 300,
        'He said "no!" and; left.',
        "a" * 200 + "\u00a0\u2028.\x85?" + "\U0001f408" * 40,
    ]
    return [text.encode() for text in texts]


def read_captions(data: bytes) -> None:
    """Read a member of a sample: caption, JSON, preference, and an array of objects."""
    for read in (parse_caption_text, lambda raw: parse_preference(parse_json_object(raw))):
        with _allowed():
            read(data)
    for offset, length, item in JsonItems(written("items.json", data)):
        assert json.loads(data.removeprefix(b"\xef\xbb\xbf")[offset : offset + length]) == item


def captions_json_seeds() -> list[bytes]:
    good = {"caption": "a cat \u00e9", "preference_probs": [0.25, 0.75], "label": 0.5}
    return [
        json.dumps(good).encode(),
        b' [{"caption": "x\\ud83d\\udc08"},\n {"b": [1e400, NaN, -0]} ] ',
        b"\xef\xbb\xbfa plain caption",
        b'{"preference_probs": [true, 1e999], "label": {}}',
    ]


def read_prompt_file(data: bytes) -> None:
    """Read the prompts of a file: every line is a prompt or a bad line."""
    for name in ("prompts.jsonl", "prompts.txt"):
        prompts, bad = read_prompts(written(name, data))
        assert len(prompts) + len(bad) == len(data.removeprefix(b"\xef\xbb\xbf").splitlines()) or (
            set(data) & set(b"\r\x0b\x0c\x1c\x1d\x1e\x85")
        )


def prompt_seeds() -> list[bytes]:
    return [
        b'{"prompt": "a cat", "id": 7, "seed": 3}\n{"caption": "b", "id": "x/../y"}\n',
        b"a cat\r\na dog\n",
    ]


# Shards and their manifest.


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


def _shard() -> tuple[bytes, Path]:
    """Return the bytes of a good shard, in a folder that has its manifest."""
    folder = place() / "shards"
    folder.mkdir(exist_ok=True)
    with (folder / "s.tar").open("wb") as file:
        writer = ShardWriter(file, "s.tar")
        for number in range(3):
            fields = json.dumps({"caption": f"caption {number}"}).encode()
            writer.write(f"{number:04d}", [("png", _png()), ("json", fields)])
        index = writer.finish()
    write_manifest(folder, [index])
    return (folder / "s.tar").read_bytes(), folder


def _read_all(folder: Path) -> None:
    """Read and decode the first samples of a folder, as training does."""
    manifest = load_manifest(folder)
    manifest.num_cached_shards = 4
    if not manifest.num_samples:
        return
    order = EpochOrder(manifest.shard_sizes, seed=0, shuffle_window=8)
    reader = IndexedShardReader(manifest, order, BatchPlan(global_batch_size=1))
    decode = DecodeRow("image", image_size=4)
    for sample_id in range(min(manifest.num_samples, 8)):
        row = decode(reader.read_sample(sample_id))
        assert row["valid"] or row["fault"]["reason"]


def _with_digest(header: bytes) -> bytes:
    """Correct the digest of a header, so that what it lists is looked at."""
    try:
        content = json.loads(header)
        lines = (f"{s['name']}\n{s['sha256']}\n{s['num_samples']}\n" for s in content["shards"])
        content["digest"] = hashlib.sha256("".join(lines).encode()).hexdigest()
        return json.dumps(content).encode()
    except (ValueError, LookupError, TypeError, RecursionError):
        return header


def read_manifest_header(data: bytes) -> None:
    """Read a manifest whose header is anything, with a right digest and with its own."""
    folder = place() / "header"
    folder.mkdir(exist_ok=True)
    header, _, body = data.partition(b"\n")
    for line in (header, _with_digest(header)):
        (folder / MANIFEST_NAME).write_bytes(line + b"\n" + body)
        with _allowed():
            load_manifest(folder).check_files()
        with _allowed():
            _read_all(folder)


def header_seeds() -> list[bytes]:
    _, folder = _shard()
    return [(folder / MANIFEST_NAME).read_bytes()]


def read_manifest_line(data: bytes) -> None:
    """Read samples by a manifest whose line of a shard is anything, with a right checksum."""
    _, folder = _shard_once()
    line = data.replace(b"\n", b" ") + b"\n"
    entry = ShardEntry("s.tar", 1, "0" * 64, 3, 0, len(line), zlib.crc32(line))
    header = {"format": "segalign-shards", "version": 1, "shards": [entry.__dict__], "digest": ""}
    head = _with_digest(json.dumps(header).encode())
    (folder / MANIFEST_NAME).write_bytes(head + b"\n" + line)
    _read_all(folder)


@functools.cache
def _shard_once() -> tuple[bytes, Path]:
    return _shard()


def line_seeds() -> list[bytes]:
    _, folder = _shard()
    return [(folder / MANIFEST_NAME).read_bytes().splitlines()[1]]


def read_shard(data: bytes) -> None:
    """Index a shard, and read one that has changed since it was indexed."""
    _, folder = _shard_once()
    for content in (data, _with_checksums(data)):
        (folder / "s.tar").write_bytes(content)
        with _allowed():
            indexed = index_shard(folder / "s.tar")
            write_manifest(folder, [indexed])
            _read_all(folder)
        _shard()
        (folder / "s.tar").write_bytes(content)
        _read_all(folder)


def _with_checksums(data: bytes) -> bytes:
    """Correct the checksums of what look like headers of a tar."""
    blocks = bytearray(data)
    for start in range(0, len(blocks) - 511, 512):
        if blocks[start + 257 : start + 262] == b"ustar":
            blocks[start + 148 : start + 156] = b" " * 8
            total = sum(blocks[start : start + 512])
            blocks[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(blocks)


def shard_seeds() -> list[bytes]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, kind in (
            ("../a.jpg", b"0"),
            ("b.json", b"2"),
            ("c.d.txt", b"0"),
            ("/e.txt", b"0"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "/etc/passwd", 3 if kind == b"0" else 0
            info.pax_headers = {"path": f"x/{name}", "size": "3", "comment": "\u00e9"}
            archive.addfile(info, io.BytesIO(b"abc"))
    return [_shard()[0], buffer.getvalue()]


# Studies.


def read_study(data: bytes) -> None:
    """Read the file of a study."""
    written("base.yaml", b"trainer: {max_steps: 3}\n")
    load_study(written("study.yaml", data), base=[place() / "base.yaml"])


def study_seeds() -> list[bytes]:
    full = {
        "name": "lengths",
        "base": ["configs/a.yaml"],
        "settings": {"trainer.max_steps": 40},
        "arms": {"plain": None, "other": {"model.init_args.omega": 0}},
        "grid": {"model.init_args.tokens": [77, 154]},
        "zip": [{"trainer.max_steps": [40, 80], "model.init_args.lr": [1e-4, 2e-4]}],
        "seeds": [0, 1],
        "exclude": [{"arm": "plain", "seed": [1]}],
        "metrics": [{"name": "val/loss", "mode": "min"}],
        "test": {"checkpoint": "best"},
        "stages": ["fit", "test"],
        "slurm": {"time": "08:00:00", "gpus_per_node": 1},
        "budget": {"max_gpu_hours": 3},
    }
    odd = b"grid: {a.b: &x [1, 2e3, 0x1F, ~, .nan, *x], c: {low: 0, high: .inf, log: true}}\n"
    single = [yaml.safe_dump({key: value}, sort_keys=False).encode() for key, value in full.items()]
    search = (
        b"search: {kind: optuna, trials: 4}\ngrid: {a.b: {low: 1, high: 3}}\n"
        b"metrics: [{name: val/loss, mode: min}]\n"
    )
    return [yaml.safe_dump(full, sort_keys=False).encode(), odd, search, *single]


# LoRA.


@functools.cache
def unet() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**TINY_UNET)


def _pairs() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for target in official_targets(unet()):
        up, down = target.pair_shapes(1)
        yield target.path, torch.ones(up), torch.ones(down)


def read_pickled_lora(data: bytes) -> None:
    """Read an official LoRA: a pickle of the old layout, and one inside an archive."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        parts = {"data.pkl": data, "byteorder": b"little", "version": b"3\n", "data/0": b"\0" * 64}
        for name, content in parts.items():
            file.writestr(f"lora/{name}", content)
    for content in (data, archive.getvalue()):
        with _allowed():
            match_official_lora(read_official_lora(written("lora.pt", content)), unet())


def pickled_seeds() -> list[bytes]:
    found = []
    for content in ([torch.ones(2, 1), torch.ones(1, 2).half()], {"a": [torch.zeros(3)]}):
        for is_zipped in (False, True):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=is_zipped)
            if is_zipped:
                with zipfile.ZipFile(buffer) as file:
                    name = next(n for n in file.namelist() if n.endswith("data.pkl"))
                    found.append(file.read(name))
            found.append(buffer.getvalue())
    return found


def read_tensor_lora(data: bytes) -> None:
    """Read LoRAs of both kinds from safetensors; the length of a header is set right as well."""
    contents = [data]
    header, found, body = data.partition(b"\n")
    if found and header.startswith(b"{"):
        contents.append(struct.pack("<Q", len(header)) + header + body)
    for content in contents:
        path = written("lora.safetensors", content)
        with _allowed():
            match_official_lora(read_official_lora(path), unet())
        with _allowed():
            load_diffusers_lora(path, unet())


def tensor_seeds() -> list[bytes]:
    named = {}
    for number, (_, up, down) in enumerate(_pairs()):
        named |= {f"{2 * number:03d}.up": up, f"{2 * number + 1:03d}.down": down}
    pairs = {path: (up, down) for path, up, down in _pairs()}
    diffusers = save_diffusers_lora(pairs, place() / "lora").read_bytes()
    settings = {"format": "pt", "lora_adapter_metadata": '{"unet.r": 1, "unet.lora_alpha": 2.0}'}
    scaled = save({"unet.a.lora_A.weight": torch.ones(1, 1)}, metadata=settings)
    good = [save(named), diffusers, scaled]
    headers = []
    for content in (scaled, save({"000.up": torch.ones(2)})):
        length = struct.unpack("<Q", content[:8])[0]
        headers.append(content[8 : 8 + length].rstrip() + b"\n" + content[8 + length :])
    return [*good, *headers]


# Checkpoints.


def _checkpoint() -> Path:
    folder = place() / "checkpoint"
    if not folder.is_dir():
        tree = {
            "state_dict": {"a": torch.ones(2)},
            "optimizer_states": [{"state": {0: {"x": torch.ones(1)}}, "lr": float("nan")}],
            "callbacks": {"Y": {"t": (1, 2), "$k": {"1": None}}},
            "global_step": 3,
        }
        save_checkpoint(tree, folder)
    return folder


def read_state(data: bytes) -> None:
    """Load a checkpoint whose state is anything, with a right digest."""
    folder = _checkpoint()
    (folder / STATE_FILE).write_bytes(data)
    meta = {"format_version": 1, "files": describe_files(folder)}
    (folder / META_FILE).write_text(json.dumps(meta))
    assert isinstance(load_checkpoint(folder), dict)


def state_seeds() -> list[bytes]:
    return [
        b'{"state_dict": {"a": {"$tensor": ["model", "a"]}}, "global_step": 3}',
        b'{"a": {"$dict": [[1, {"$tuple": [1, {"$float": "nan"}]}]]}, "b": {"$counter": [[1, 2]]}}',
    ]


def read_meta(data: bytes) -> None:
    """Load a checkpoint whose record of files is anything."""
    folder = _checkpoint()
    (folder / STATE_FILE).write_bytes(state_seeds()[0])
    (folder / META_FILE).write_bytes(data)
    load_checkpoint(folder)


def meta_seeds() -> list[bytes]:
    folder = _checkpoint()
    (folder / STATE_FILE).write_bytes(state_seeds()[0])
    outside = {"format_version": 1, "files": {"../x/y": {"size": 1, "sha256": ""}}}
    good = {"format_version": 1, "files": describe_files(folder)}
    return [json.dumps(good).encode(), json.dumps(outside).encode()]


class _allowed:
    """A block that may raise what targets may."""

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: type | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, ALLOWED)


TARGETS = {
    "caption": Target(split_caption, caption_seeds),
    "caption_json": Target(read_captions, captions_json_seeds),
    "prompts": Target(read_prompt_file, prompt_seeds),
    "manifest_header": Target(read_manifest_header, header_seeds),
    "manifest_line": Target(read_manifest_line, line_seeds),
    "shard": Target(read_shard, shard_seeds),
    "study": Target(read_study, study_seeds),
    "lora_pickle": Target(read_pickled_lora, pickled_seeds),
    "lora_tensors": Target(read_tensor_lora, tensor_seeds),
    "checkpoint_state": Target(read_state, state_seeds),
    "checkpoint_meta": Target(read_meta, meta_seeds),
}
