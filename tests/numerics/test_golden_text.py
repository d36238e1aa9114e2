"""Segments and merged embeddings of the official LongAlign code (commit 61a1021), as numbers.

Golden G1 (cases A to E, CLIP part) and G2. The relative error allowed is 1e-5 in the L2 norm, the
golden files' own suggestion for float32 forward values; 3e-7 is what another platform reached.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from segalign.text.segment_encoder import SegmentEncoder
from segalign.text.segmenter import OfficialSegmenter
from segalign.text.special_tokens import SpecialTokenPolicy
from segalign.text.tokenizer import clip_tokenizer

pytestmark = pytest.mark.numerics

GOLDEN = Path(__file__).parents[1] / "golden"
G1 = json.loads((GOLDEN / "g1_caption2embed.json").read_text())
G2 = json.loads((GOLDEN / "g2_segments.json").read_text())["items"]
CASES = [("A", 77), ("A", 240), ("B", 77), ("B", 240), ("C", 77), ("D", 77), ("E", 77)]


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "g1_caption2embed.safetensors")


@pytest.fixture(scope="module")
def text_model():
    stored = load_file(GOLDEN / "g1_text_encoder.safetensors")
    name = "text_model.embeddings.token_embedding.weight"
    ids, rows = stored.pop(f"{name}.ids"), stored.pop(f"{name}.rows")
    stored[name] = torch.zeros(49408, rows.shape[1], dtype=rows.dtype)
    stored[name][ids.long()] = rows
    model = CLIPTextModel(CLIPTextConfig(**G1["text_config"])).eval().requires_grad_(False)
    model.load_state_dict({k.removeprefix("text_model."): v.float() for k, v in stored.items()})
    return model


def official_encoder(text_model, case, token_budget, **settings):
    return SegmentEncoder(
        text_model,
        clip_tokenizer(pad_token=G1["cases"][case]["pad_token"]),
        segmenter=OfficialSegmenter(),
        policy=SpecialTokenPolicy(drop_pad_words=True),
        token_budget=token_budget,
        **{"long_segments": "truncate", **settings},
    )


def encode(encoder, case):
    captions = G1["cases"][case]["captions"]
    if case != "D":
        return encoder(captions)
    segments, owners = captions
    return encoder.encode_segments(
        [[s for s, owner in zip(segments, owners, strict=True) if owner == i] for i in (0, 1)]
    )


def relative_error(ours, golden):
    return ((ours - golden).norm() / golden.norm()).item()


@pytest.mark.parametrize(("case", "token_budget"), CASES)
def test_merged_embeddings_equal_the_official_ones(text_model, tensors, case, token_budget):
    result = encode(official_encoder(text_model, case, token_budget), case)
    golden = tensors[f"{case}.concat_tl{token_budget}"]
    assert result.prompt_embeds.shape == golden.shape
    assert relative_error(result.prompt_embeds, golden) < 1e-5


@pytest.mark.parametrize(("case", "token_budget"), CASES)
def test_kept_tokens_equal_the_official_counts(text_model, case, token_budget):
    result = encode(official_encoder(text_model, case, token_budget), case)
    kept = [min(n, token_budget) for n in G1["cases"][case]["kept_tokens_per_caption"]]
    assert list(result.report.kept_tokens) == kept
    assert result.attention_mask.sum(dim=1).tolist() == kept


@pytest.mark.parametrize("case", "ABCDE")
def test_input_ids_equal_the_official_ones(text_model, tensors, case):
    tower = official_encoder(text_model, case, 77).tower
    segments = G1["cases"][case]["tokenizer_calls"][0]
    ids, mask = tensors[f"{case}.input_ids"], tensors[f"{case}.attention_mask"].bool()
    expected = [tuple(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)]
    assert [tower.wrap(tower.word_ids(text)[:75]) for text in segments] == expected


@pytest.mark.parametrize("case", ["A", "E"])
def test_padded_empty_prompt_equals_the_official_one(text_model, tensors, case):
    tower = official_encoder(text_model, case, 77).tower
    assert tower.wrap((), padded=True) == tuple(tensors[f"pad_prompt_ids.{case}"][0].tolist())


@pytest.mark.parametrize("case", "ABCDE")
def test_padding_equals_the_official_pad_vector(text_model, tensors, case):
    result = encode(official_encoder(text_model, case, 240), case)
    assert relative_error(result.prompt_embeds[-1, -1], tensors[f"{case}.pad_embed"][0]) < 1e-5


def test_unpadded_states_equal_those_padded_to_the_longest(text_model, tensors):
    tower = official_encoder(text_model, "A", 77).tower
    ids = tensors["A.input_ids"]
    golden = tensors["A.encoder_hidden_states"]
    mask = tensors["A.attention_mask"].bool()
    sequences = [tuple(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)]
    features = tower(sequences)
    ours = torch.cat([features[sequence] for sequence in sequences])
    assert relative_error(ours, golden[mask]) < 1e-5


def test_counts_what_the_official_code_loses_silently(text_model):
    whole = official_encoder(text_model, "B", 240, long_segments="cut_further")
    lost = encode(official_encoder(text_model, "B", 240), "B").report
    cut = encode(whole, "B").report
    assert lost.cut_segments == cut.cut_segments == (1, 0)
    assert cut.dropped_tokens == (0, 0)
    # Cutting keeps the lost words, behind one more start token for each further segment.
    further_segments = cut.num_segments[0] - lost.num_segments[0]
    assert cut.kept_tokens[0] == lost.kept_tokens[0] + lost.dropped_tokens[0] + further_segments


def test_budget_cut_is_counted(text_model):
    report = encode(official_encoder(text_model, "A", 240), "A").report
    assert report.dropped_tokens == (0, 0, 269 - 240, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("item", G2, ids=lambda item: item["caption"][:24])
def test_official_segments(item):
    segments = OfficialSegmenter().split(item["caption"])
    assert [segment.text for segment in segments] == item["segments"]


def test_all_golden_captions_are_there():
    assert len(G2) == 36
    assert sorted(G1["cases"]) == list("ABCDE")
