"""Chunks change memory, not numbers."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from segalign.rewards.chunks import encode_in_chunks, encode_texts

TEXTS = ["a", "bb", "ccc", "dddd", "eeeee"]


class Encoder(torch.nn.Module):
    """Rows to unit vectors; counts its calls, and the rows whose activations live at each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(3, 64, dtype=torch.float64)
        self.second = torch.nn.Linear(64, 4, dtype=torch.float64)
        self.calls = []
        self.kept = []
        self.rows_kept = []

    def forward(self, rows):
        self.calls.append(len(rows))
        if isinstance(rows, list):
            rows = torch.tensor([[len(row), 1.0, 2.0] for row in rows], dtype=torch.float64)
        hidden = torch.tanh(self.first(rows))
        self.kept.append((StorageWeakRef(hidden.untyped_storage()), len(rows)))
        self.rows_kept.append(sum(count for one, count in self.kept if not one.expired()))
        return F.normalize(self.second(hidden), dim=-1)


def rows_of(kind):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    return TEXTS if kind == "texts" else images


def gradients(kind, chunk_size):
    """Features, and gradients of what couples all rows."""
    encoder = Encoder()
    features = encode_in_chunks(encoder, rows_of(kind), chunk_size)
    loss = (features @ features.T).exp().sum()
    return [features, *torch.autograd.grad(loss, list(encoder.parameters()))], encoder.calls


@pytest.mark.parametrize("kind", ["texts", "images"])
@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_values_and_gradients_are_equal(kind, chunk_size):
    expected, _ = gradients(kind, None)
    found, calls = gradients(kind, chunk_size)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-12
    sizes = [min(chunk_size, 5 - start) for start in range(0, 5, chunk_size)]
    assert sorted(calls) == sorted(2 * sizes)  # once forward, once for the backward pass


@pytest.mark.parametrize("chunk_size", [None, 5, 9])
def test_a_batch_that_fits_is_encoded_once(chunk_size):
    _, calls = gradients("texts", chunk_size)
    assert calls == [5]


def test_without_gradients_nothing_is_recomputed():
    encoder = Encoder()
    with torch.no_grad():
        features = encode_in_chunks(encoder, TEXTS, 2)
    assert encoder.calls == [2, 2, 1]
    assert not features.requires_grad


@pytest.mark.parametrize(("chunk_size", "most"), [(None, 32), (4, 4), (1, 1)])
def test_the_activations_of_one_chunk_are_kept_at_a_time(chunk_size, most):
    encoder = Encoder()
    features = encode_in_chunks(encoder, torch.randn(32, 3, dtype=torch.float64), chunk_size)
    features.sum().backward()
    assert max(encoder.rows_kept) == most


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 4])
def test_equal_texts_are_encoded_once_and_in_order_of_length(chunk_size):
    texts = ["dddd", "a", "dddd", "eeeee", "bb", "a"]
    encoder = Encoder()
    features = encode_texts(encoder, texts, chunk_size=chunk_size)
    assert torch.allclose(features, torch.cat([encoder([text]) for text in texts]), atol=1e-12)
    calls = {None: [6], 1: [1] * 4, 2: [2, 2], 4: [4]}[chunk_size]
    assert encoder.calls[: len(calls)] == calls
    weights = list(encoder.parameters())
    whole = Encoder()
    expected = torch.autograd.grad(whole(texts).sin().sum(), list(whole.parameters()))
    found = torch.autograd.grad(features.sin().sum(), weights)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
