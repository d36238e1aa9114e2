"""Time segment encoding against padding every segment to the longest of the batch.

Both run in this process on the same random weights and captions, and their results are asserted
to be equal; the ratio of their times is what matters, not the times.

    python benchmarks/segment_encoding.py --size clip-l
    python benchmarks/segment_encoding.py --size small --repeats 5 --device cuda
"""

import argparse
import random
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from segalign.text.segment_encoder import SegmentEncoder
from segalign.text.tokenizer import clip_tokenizer

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


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the best of some timings: CPU seconds, or seconds of the clock on a GPU."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return min(times)


@torch.no_grad()
def main() -> None:
    """Print one row per case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)

    config = CLIPTextConfig(vocab_size=49408, **SIZES[args.size])
    text_model = CLIPTextModel(config).eval().requires_grad_(False).to(device)
    encoder = SegmentEncoder(text_model, clip_tokenizer())

    def encode_cold(captions: list[str]) -> Tensor:
        encoder.clear_cache()
        return encoder(captions).prompt_embeds

    print("segments       padded to longest   ours, cold cache       ours, warm cache")
    for one_long_segment in (False, True):
        captions = make_captions(0, one_long_segment=one_long_segment)
        expected = encode_padded_to_longest(encoder, captions)
        for ours in (encode_cold(captions), encoder(captions).prompt_embeds):
            torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)
        padded = seconds(
            lambda c=captions: encode_padded_to_longest(encoder, c), device, args.repeats
        )
        cold = seconds(lambda c=captions: encode_cold(c), device, args.repeats)
        encoder(captions)
        warm = seconds(lambda c=captions: encoder(c), device, args.repeats)
        label = "one of 77" if one_long_segment else "typical"
        print(
            f"{label:<15}{padded:8.4f} s        {cold:8.4f} s = {padded / cold:4.2f}x   "
            f"{warm:8.4f} s = {padded / warm:5.1f}x"
        )


if __name__ == "__main__":
    main()
