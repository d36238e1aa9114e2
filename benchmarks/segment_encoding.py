"""Time segment encoding against padding every segment to the longest of the batch.

Both run in this process on the same random weights and captions, and their results are asserted
to be equal; the ratio of their times is what matters, not the times. The table goes to the
terminal, one JSON line per run to ``benchmarks/results/segment_encoding.jsonl``.

    python benchmarks/segment_encoding.py --size clip-l
    python benchmarks/segment_encoding.py --size small --repeats 5 --device cuda
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from segalign.text.segment_encoder import SegmentEncoder
from segalign.text.tokenizer import clip_tokenizer

RESULTS = Path(__file__).parent / "results" / "segment_encoding.jsonl"
SIZES = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "clip-l": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
}
WORDS = ("a", "red", "old", "house", "near", "the", "lake", "with", "tall", "trees", "and", "grey")
NUM_CAPTIONS, NUM_SEGMENTS, MAX_WORDS = 16, 12, 37
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        case: What is encoded.
        goal: Ratio that was asked for.
        reference: Seconds of padding to the longest, per repeat.
        ours: Seconds of segment encoding, per repeat.
        error: Largest difference of the results.
    """

    case: str
    goal: float
    reference: list[float]
    ours: list[float]
    error: float

    @property
    def ratio(self) -> float:
        """The reference's best time over ours."""
        return min(self.reference) / min(self.ours)


def make_captions(seed: int, *, one_long_segment: bool) -> list[str]:
    """Draw captions of 12 distinct segments: 19 tokens on average, 40 at most, or one of 77."""
    draw = random.Random(seed)
    lengths = [
        min(max(round(draw.gauss(16, 8)), 3), MAX_WORDS) for _ in range(NUM_CAPTIONS * NUM_SEGMENTS)
    ]
    lengths[0] = 74 if one_long_segment else MAX_WORDS
    segments = [" ".join(draw.choices(WORDS, k=length)).capitalize() + "." for length in lengths]
    return [" ".join(segments[i : i + NUM_SEGMENTS]) for i in range(0, len(segments), NUM_SEGMENTS)]


def encode_padded_to_longest(encoder: SegmentEncoder, captions: list[str]) -> Tensor:
    """Encode as the official code does: one pass, all segments as wide as the longest."""
    tower = encoder.tower
    owners, sequences = [], []
    for owner, caption in enumerate(captions):
        for segment in encoder.segmenter.split(caption):
            owners.append(owner)
            sequences.append(tower.wrap(tower.word_ids(segment.text)))
    width = max(map(len, sequences))
    ids = torch.tensor([s + (tower.pad_token_id,) * (width - len(s)) for s in sequences])
    states = tower.text_model(input_ids=ids.to(tower.text_model.device)).last_hidden_state
    empty = torch.tensor([tower.wrap((), padded=True)]).to(tower.text_model.device)
    pad_star = tower.text_model(input_ids=empty).last_hidden_state[0, -60:].mean(dim=0)
    merged = []
    for owner in range(len(captions)):
        rows = [i for i, other in enumerate(owners) if other == owner]
        kept = torch.cat([states[i, : len(sequences[i]) - 1] for i in rows])[: encoder.token_budget]
        padding = pad_star.expand(encoder.token_budget - len(kept), -1)
        merged.append(torch.cat([kept, padding]))
    return torch.stack(merged)


def timed(
    run: Callable[[], Tensor], device: torch.device, repeats: int
) -> tuple[Tensor, list[float]]:
    """Return the last result and all times: CPU seconds, or seconds of the clock on a GPU."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times = []
    for _ in range(repeats):
        start = clock()
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return result, times


def measure(encoder: SegmentEncoder, device: torch.device, repeats: int) -> list[Row]:
    """Time all cases; the results are asserted to be equal in each."""

    def encode_cold(captions: list[str]) -> Tensor:
        encoder.clear_cache()
        return encoder(captions).prompt_embeds

    if device.type == "cuda":  # the first passes choose kernels
        encode_padded_to_longest(encoder, make_captions(1, one_long_segment=False))
        encode_cold(make_captions(1, one_long_segment=True))
    rows = []
    for one_long_segment in (False, True):
        captions = make_captions(0, one_long_segment=one_long_segment)
        expected, reference = timed(
            lambda c=captions: encode_padded_to_longest(encoder, c), device, repeats
        )
        # Cold runs come first, so that the last one fills the cache of the warm ones.
        cases = [("cold, one sentence of 77", 4.0, encode_cold)]
        if not one_long_segment:
            cases = [
                ("cold, typical", 2.2, encode_cold),
                ("warm, typical", 20.0, lambda c: encoder(c).prompt_embeds),
            ]
        for case, goal, encode in cases:
            ours, times = timed(lambda c=captions, e=encode: e(c), device, repeats)
            torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE)
            error = (ours - expected).abs().max().item()
            rows.append(Row(case, goal, reference, times, error))
    return rows


def show(rows: list[Row], unit: str) -> None:
    """Print the table."""
    print(f"{'captions':<26}{'padded to longest':>18}{'ours':>12}{'ratio':>9}{'goal':>8}   error")
    for row in rows:
        print(
            f"{row.case:<26}{min(row.reference):>16.3f} s{min(row.ours):>10.4f} s"
            f"{row.ratio:>8.2f}x{row.goal:>7.1f}x   {row.error:.1e}"
        )
    print(f"{unit}, best of {len(rows[0].ours)}; medians in the JSON line")


def write(rows: list[Row], options: argparse.Namespace, where: str) -> None:
    """Append one JSON line."""
    cases: dict[str, Any] = {
        row.case: {
            "reference_seconds": round(min(row.reference), 4),
            "reference_seconds_median": round(statistics.median(row.reference), 4),
            "seconds": round(min(row.ours), 5),
            "seconds_median": round(statistics.median(row.ours), 5),
            "ratio": round(row.ratio, 2),
            "goal": row.goal,
            "max_error": row.error,
        }
        for row in rows
    }
    line = {
        "size": options.size,
        "device": where,
        "threads": torch.get_num_threads(),
        "repeats": options.repeats,
        "torch": torch.__version__,
        "captions": [NUM_CAPTIONS, NUM_SEGMENTS],
        "cases": cases,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


@torch.no_grad()
def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    config = CLIPTextConfig(vocab_size=49408, **SIZES[options.size])
    text_model = CLIPTextModel(config).eval().requires_grad_(False).to(device)
    rows = measure(SegmentEncoder(text_model, clip_tokenizer()), device, options.repeats)
    on_cpu = device.type == "cpu"
    where = platform.processor() or platform.machine()
    where = where if on_cpu else torch.cuda.get_device_name(device)
    show(rows, "CPU seconds of one thread" if on_cpu else f"Seconds on {where}")
    write(rows, options, where)


if __name__ == "__main__":
    main()
