"""A tiny T5 encoder with random weights, and an offline word tokenizer with T5's interface."""

import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from segalign.text.adapter import TextAdapter

SPECIAL = ("<pad>", "</s>", "<unk>")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?"


def toy_t5_tokenizer(words=()):
    """Build a Unigram tokenizer that knows letters and some words; ids 0, 1, 2 are T5's."""
    pieces = ["▁", *LETTERS, *(f"▁{word}" for word in words)]
    vocab = [*((name, 0.0) for name in SPECIAL), *((piece, -1.0) for piece in pieces)]
    return T5Tokenizer(vocab=vocab, extra_ids=0)


def toy_t5(seed=0, *, width=32, **settings):
    """Build a T5 encoder of two layers, frozen, in evaluation mode, with dropout in its config."""
    config = T5Config(
        **{
            "vocab_size": 300,
            "d_model": width,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.1,
            **settings,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = T5EncoderModel(config)
    return model.eval().requires_grad_(False)


def toy_adapter(seed=0, *, in_dim=32, int_dim=12, out_dim=16):
    """Build a small adapter whose norms and biases are random too, so that each one matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = TextAdapter(in_dim, int_dim, out_dim)
        for weight in adapter.parameters():
            weight.data.normal_(std=0.3)
    return adapter
