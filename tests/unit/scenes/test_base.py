"""The tiny base: its weights on disk, its errors, and what the shipped one can do."""

import json

import pytest
import torch
from safetensors.torch import save_file

from segalign.errors import ConfigError, DataError
from segalign.scenes.base import ScenesBase, load_scorer
from segalign.scenes.evaluation import score_bundle
from segalign.scenes.models import generator_unet
from segalign.scenes.reading import FactReader
from segalign.scenes.samples import make_sample
from segalign.scenes.weights import fill_weights, load_compact, save_compact, shipped_folder
from segalign.scenes.world import get_world
from segalign.text.settings import TextEncoding
from segalign.text.tokenizer import clip_tokenizer


@pytest.mark.parametrize("prefix", ["embeddings", "text"])
def test_compact_weights_keep_the_used_rows(tmp_path, prefix):
    embedding = torch.randn(49408, 4)
    name = f"{prefix}.token_embedding.weight"
    state = {name: embedding, "head.weight": torch.randn(3, 3), "norm.count": torch.tensor(70_001)}
    save_compact(state, tmp_path / "x.safetensors", torch.tensor([2, 49407]))
    loaded = load_compact(tmp_path / "x.safetensors")
    assert loaded.keys() == state.keys()
    assert torch.allclose(loaded["head.weight"], state["head.weight"], rtol=1e-3)
    assert torch.equal(loaded["norm.count"], state["norm.count"])
    rows = loaded[name]
    assert torch.allclose(rows[[2, 49407]], embedding[[2, 49407]], rtol=1e-3, atol=1e-6)
    assert rows.count_nonzero() == 8
    assert (tmp_path / "x.safetensors").stat().st_size < 2000


def test_settings_that_cannot_work(tmp_path):
    with pytest.raises(ConfigError, match="shipped weights of `generator` for world `2x2`; there"):
        ScenesBase(world="2x2").load()
    with pytest.raises(ConfigError, match="got `5x5`"):
        ScenesBase(world="5x5").load()
    with pytest.raises(ConfigError, match="nowhere"):
        ScenesBase(generator=str(tmp_path / "nowhere")).load()


def test_weights_of_another_network_are_refused():
    model = generator_unet(get_world("2x2"))
    state = dict(model.state_dict())
    state["conv_in.weight"] = torch.zeros(1)
    with pytest.raises(DataError, match=r"`conv_in.weight` is \(1,\) instead of \(64, 108, 3, 3\)"):
        fill_weights(model, state, "somewhere")


def test_a_random_base_builds_for_every_world():
    for world in ("2x2", "3x3"):
        bundle = ScenesBase(world=world, generator="random", text_model="random").load()
        assert bundle.image_size == get_world(world).image_size
        assert not torch.equal(*(p.flatten()[:2] for p in list(bundle.unet.parameters())[:2]))


def test_the_reader_locates_sentences_and_learns_their_facts():
    world, tokenizer = get_world("2x2"), clip_tokenizer()
    samples = [make_sample("2x2", 0, index, length="short") for index in range(3)]
    reader = FactReader(world, 8)
    where, labels = reader.statements(
        [s.caption for s in samples], [s.metadata for s in samples], tokenizer
    )
    ids = tokenizer([s.caption for s in samples], padding="max_length", return_tensors="pt")
    ends = ids.input_ids[where[:, 0], where[:, 1]]
    assert set(ends.tolist()) == set(tokenizer(".", add_special_tokens=False).input_ids)
    kind, cell, value, _, _ = samples[0].metadata["facts"][0]
    assert labels["place"][0] == (4 if cell < 0 else cell)
    assert reader.values[kind][labels[kind][0]] == value
    states = torch.zeros(3, 77, 8, requires_grad=True)
    losses = reader(states, where, labels)
    assert losses.shape == (3,)
    losses.sum().backward()
    touched = states.grad.abs().sum(-1).nonzero().tolist()
    assert touched == sorted(where.tolist())


def test_nothing_to_read_costs_nothing():
    reader = FactReader(get_world("2x2"), 8)
    where, labels = reader.statements(["", "Plain text."], [{}, {}], clip_tokenizer())
    assert reader(torch.zeros(2, 77, 8), where, labels).tolist() == [0, 0]


def test_the_shipped_base_tells_where_it_comes_from():
    provenance = json.loads((shipped_folder() / "provenance.json").read_text())
    assert provenance["oracle"]["attributes"] >= 0.9
    assert provenance["runs"].keys() >= {"scorer", "generator"}
    for run in provenance["runs"].values():
        assert run["steps"] > 0
        assert run["curve"]
    sizes = [file.stat().st_size for file in shipped_folder().glob("*.safetensors")]
    assert len(sizes) == 5
    assert sum(sizes) < 8e6


@pytest.mark.numerics
def test_the_shipped_base_follows_short_captions_and_loses_what_is_cut():
    bundle = ScenesBase().load()
    encoding = TextEncoding(kind="truncated", mask_padding=True)

    def score(length):
        samples = [make_sample("3x3", 77, i, length=length) for i in range(24)]
        return score_bundle(bundle, encoding, samples).accuracies()

    assert score("short")["attributes"] >= 0.85
    assert score("long")["attributes/past_77"] <= 0.35


def test_the_shipped_scorer_loads():
    model = load_scorer("3x3", "shipped")
    assert model.logit_scale.exp() > 5


def test_a_run_without_the_part_is_named(tmp_path):
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    save_file({"other.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises((ConfigError, DataError), match=r"step-00000001|checkpoint"):
        ScenesBase(generator=str(tmp_path)).load()
