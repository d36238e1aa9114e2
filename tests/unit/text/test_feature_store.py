import copy
import json
import pickle

import numpy as np
import pytest
import torch
import webdataset
from accelerate import cpu_offload
from safetensors import safe_open

from segalign.data.caption_stream import CaptionStream
from segalign.data.manifest import index_shards
from segalign.errors import ConfigError, DataError
from segalign.text import store_writer
from segalign.text.clip_tower import ClipTower
from segalign.text.digest_index import DigestIndex, DigestSet, digest_ids
from segalign.text.feature_store import FeatureStore, weights_digest
from segalign.text.segment_encoder import SegmentEncoder
from segalign.text.segmenter import OfficialSegmenter, SentenceSegmenter
from segalign.text.segmenters import describe_segmenter
from segalign.text.store_writer import StoreSettings, write_store

CAPTIONS = [
    *(f"Picture {i} of a cat. The sky is grey. {'a red dog and ' * (i % 30)}." for i in range(40)),
    "  ",
    "",
    "red apples, green pears, " * 30,
    *(f"The house has {i} trees." for i in range(40)),
]


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    with webdataset.ShardWriter(str(folder / "x-%d.tar"), maxcount=20, verbose=0) as writer:
        for number, caption in enumerate(CAPTIONS):
            kind = {"txt": caption} if number % 2 else {"json": {"caption": caption}}
            writer.write({"__key__": f"{number:03d}", "jpg": b"not read", **kind})
    return CaptionStream(index_shards(folder))


@pytest.fixture
def write(captions, make_text_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, "_MAX_BATCH_CAPTIONS", 8)

    def run(folder="store", model=None, *, layer=-1, segmenter=None, **settings):
        tower = ClipTower(model or make_text_model(), tokenizer, layer=layer, cache_bytes=0)
        segmenter = segmenter or SentenceSegmenter()
        description = describe_segmenter(segmenter)
        settings = {"max_shard_bytes": 60_000, **settings}
        settings = StoreSettings(segmenter=segmenter, segmenter_description=description, **settings)
        return write_store(captions, tower, tmp_path / folder, settings)

    return run


def count_passes(tower):
    passes = []
    tower.text_model.register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


def usable():
    return [caption for caption in CAPTIONS if caption.strip()]


def test_stored_features_are_those_encoded_on_the_fly(write, make_text_model, tokenizer, tmp_path):
    report = write()
    store = FeatureStore.open(tmp_path / "store")
    encoder = SegmentEncoder(make_text_model(), tokenizer, store=store, cache_bytes=0)
    plain = SegmentEncoder(make_text_model(), tokenizer, cache_bytes=0)
    passes = count_passes(encoder.tower)
    for batch in (usable(), usable()[::-7], [""]):
        stored, fresh = encoder(batch), plain(batch)
        assert torch.equal(stored.prompt_embeds, fresh.prompt_embeds)
        assert torch.equal(stored.pooled, fresh.pooled)
    assert passes == []
    assert report.num_shards > 3
    assert (report.num_samples, report.set_aside) == (len(CAPTIONS), {"caption_empty": 2})
    assert len(store) == report.num_sequences


def test_every_distinct_sequence_is_stored_once(write, make_text_model, tokenizer, tmp_path):
    report = write()
    encoder = SegmentEncoder(make_text_model(), tokenizer)
    tower = encoder.tower
    texts = {piece.text for caption in usable() for piece in encoder.split(caption)}
    words = {ids for text in texts if (ids := tower.word_ids(text))}
    expected = {*map(tower.wrap, words), tower.wrap(()), tower.wrap((), padded=True)}
    assert report.num_sequences == len(expected)
    assert report.num_tokens == sum(map(len, expected))
    store = FeatureStore.open(tmp_path / "store")
    assert all(store.get(sequence) is not None for sequence in expected)
    assert store.get(tower.wrap(tower.word_ids("never seen"))) is None


def test_what_the_store_lacks_is_encoded(write, make_text_model, tokenizer, tmp_path):
    write()
    store = FeatureStore.open(tmp_path / "store")
    encoder = SegmentEncoder(make_text_model(), tokenizer, store=store)
    caption = "The sky is grey. A new sentence."
    plain = SegmentEncoder(make_text_model(), tokenizer)([caption])
    passes = count_passes(encoder.tower)
    for _ in range(2):
        assert torch.equal(encoder([caption]).prompt_embeds, plain.prompt_embeds)
    assert passes == [1]


def test_features_of_the_store_are_cached_apart_from_their_file(
    write, make_text_model, tokenizer, tmp_path, monkeypatch
):
    write()
    store = FeatureStore.open(tmp_path / "store")
    encoder = SegmentEncoder(make_text_model(), tokenizer, store=store)
    first = encoder(usable()).prompt_embeds
    assert encoder.tower.cached_bytes > 0
    monkeypatch.setattr(FeatureStore, "get", None)
    assert torch.equal(encoder(usable()).prompt_embeds, first)


def test_a_projecting_model_and_another_layer(write, projecting_model, tokenizer, tmp_path):
    write(model=projecting_model, layer=-2)
    store = FeatureStore.open(tmp_path / "store")
    settings = {"layer": -2, "cache_bytes": 0}
    stored = SegmentEncoder(projecting_model, tokenizer, store=store, **settings)(usable())
    plain = SegmentEncoder(projecting_model, tokenizer, **settings)(usable())
    assert torch.equal(stored.prompt_embeds, plain.prompt_embeds)
    assert torch.equal(stored.pooled, plain.pooled)
    with pytest.raises(ConfigError, match="features of layer -2, not -1; make another"):
        SegmentEncoder(projecting_model, tokenizer, store=store)


def test_float16_halves_the_size_and_loses_what_it_states(
    write, make_text_model, tokenizer, tmp_path
):
    whole, half = write("whole"), write("half", dtype="float16", max_shard_bytes=30_000)
    assert half.num_bytes < 0.62 * whole.num_bytes  # the tables of digests are as large
    stores = {name: FeatureStore.open(tmp_path / name) for name in ("whole", "half")}
    tower = ClipTower(make_text_model(), tokenizer)
    sequence = tower.wrap(tower.word_ids("The sky is grey."))
    exact, rounded = (stores[name].get(sequence)[0].float() for name in ("whole", "half"))
    assert not torch.equal(exact, rounded)
    assert ((exact - rounded).abs() <= exact.abs() * 2**-11 + 3e-8).all()
    encoder = SegmentEncoder(make_text_model(), tokenizer, store=stores["half"])
    assert encoder(["The sky is grey."]).prompt_embeds.dtype == torch.float32


def test_numbers_that_float16_has_not_are_refused(write, make_text_model):
    model = make_text_model()
    model.final_layer_norm.bias.data += 1e5
    with pytest.raises(DataError, match=r"finite numbers of torch.float16; .* `--dtype float32`"):
        write(model=model, dtype="float16")


@pytest.mark.parametrize("num_shards", [0, 1, 3])
def test_a_killed_run_goes_on_where_it_stopped(write, tmp_path, monkeypatch, num_shards):
    whole = write("whole")
    written = []
    write_bytes = store_writer.write_bytes_atomic

    def stop(path, data):
        if len(written) == num_shards:
            raise KeyboardInterrupt
        written.append(path)
        write_bytes(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(store_writer, "write_bytes_atomic", stop)
        with pytest.raises(KeyboardInterrupt):
            write("killed")
    with pytest.raises(ConfigError, match=r"finished feature store .* no `store.json`"):
        FeatureStore.open(tmp_path / "killed")
    kept = [path.stat().st_mtime_ns for path in written]
    again, straight = write("killed"), write("straight")
    assert [path.stat().st_mtime_ns for path in written] == kept
    assert again == straight
    assert again.num_sequences == whole.num_sequences
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def test_a_finished_store_is_kept(write, tmp_path, make_text_model):
    report = write()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    assert write() == report
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    assert {k: v for k, v in after.items() if not k.startswith(".")} == {
        k: v for k, v in before.items() if not k.startswith(".")
    }


@pytest.mark.parametrize(
    ("changed", "settings"),
    [
        ("weights", {"seed": 1}),
        ("segmenter", {"segmenter": OfficialSegmenter()}),
        ("dtype", {"dtype": "float16"}),
        ("long_segments", {"long_segments": "truncate"}),
    ],
)
def test_a_store_is_not_mixed_with_another(write, make_text_model, changed, settings):
    write()
    model = make_text_model(seed=settings.pop("seed", 0))
    with pytest.raises(DataError, match=f"holds one with another `{changed}`; choose another"):
        write(model=model, **settings)


def test_other_weights_are_refused_with_one_line(write, make_text_model, tokenizer, tmp_path):
    write()
    store = FeatureStore.open(tmp_path / "store")
    model = make_text_model()
    model.encoder.layers[1].mlp.fc1.bias.data[0] += 1e-6
    with pytest.raises(ConfigError, match=r"it holds features of other weights \(") as refusal:
        SegmentEncoder(model, tokenizer, store=store)
    assert "\n" not in str(refusal.value)


def test_settings_beside_the_weights_are_part_of_their_digest(make_text_model):
    model, other = make_text_model(), make_text_model()
    assert weights_digest(model) == weights_digest(other)
    other.config.hidden_act = "gelu"
    assert weights_digest(model) != weights_digest(other)


def test_weights_that_change_later_are_refused_too(write, make_text_model, tokenizer, tmp_path):
    write()
    store = FeatureStore.open(tmp_path / "store")
    encoder = SegmentEncoder(make_text_model(), tokenizer, store=store)
    encoder(["The sky is grey."])
    encoder.tower.text_model.load_state_dict(make_text_model(seed=1).state_dict())
    for _ in range(2):
        with pytest.raises(ConfigError, match="other weights"):
            encoder(["The sky is grey."])


def test_a_cast_keeps_the_store(write, make_text_model, tokenizer, tmp_path):
    write()
    store = FeatureStore.open(tmp_path / "store")
    encoder = SegmentEncoder(make_text_model(), tokenizer, store=store)
    exact = encoder(["The sky is grey."]).prompt_embeds
    passes = count_passes(encoder.tower)
    rounded = encoder.to(torch.bfloat16)(["The sky is grey."]).prompt_embeds
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=2**-7, atol=1e-3)
    assert passes == []


def test_a_cast_does_not_hide_a_change_of_weights(write, make_text_model, tokenizer, tmp_path):
    write()
    store = FeatureStore.open(tmp_path / "store")
    encoder = SegmentEncoder(make_text_model(), tokenizer, store=store)
    encoder.tower.text_model.load_state_dict(make_text_model(seed=1).state_dict())
    with pytest.raises(ConfigError, match="other weights"):
        encoder.to(torch.bfloat16)


def test_weights_that_are_not_there_are_refused(write, make_text_model, tokenizer, tmp_path):
    write()
    store = FeatureStore.open(tmp_path / "store")
    model = cpu_offload(make_text_model(), execution_device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="these are offloaded layer by layer") as refusal:
        SegmentEncoder(model, tokenizer, store=store)
    assert "\n" not in str(refusal.value)


def test_a_store_without_a_recorded_precision_is_of_float32(
    write, make_text_model, tokenizer, tmp_path
):
    write()
    path = tmp_path / "store" / "store.json"
    description = json.loads(path.read_text())
    assert description.pop("weights_dtype") == "float32"
    path.write_text(json.dumps(description))
    store = FeatureStore.open(tmp_path / "store")
    SegmentEncoder(make_text_model(), tokenizer, store=store)
    with pytest.raises(ConfigError, match="weights in float32, the model's are in bfloat16"):
        SegmentEncoder(make_text_model().bfloat16(), tokenizer, store=store)


def test_a_trained_model_is_refused(write, make_text_model, tokenizer, tmp_path):
    write()
    store = FeatureStore.open(tmp_path / "store")
    encoder = SegmentEncoder(make_text_model(), tokenizer, store=store)
    encoder.requires_grad_(True)
    with pytest.raises(ConfigError, match="serves a frozen text model; this one is trained"):
        encoder(["A cat."])


def test_copies_share_the_files(write, make_text_model, tokenizer, tmp_path):
    write()
    store = FeatureStore.open(tmp_path / "store")
    encoder = SegmentEncoder(make_text_model(), tokenizer, store=store)
    expected = encoder(usable()[:3]).prompt_embeds
    assert torch.equal(copy.deepcopy(encoder)(usable()[:3]).prompt_embeds, expected)
    sequence = encoder.tower.wrap(())
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again.get(sequence)[0], store.get(sequence)[0])


def test_the_number_of_open_files_is_bounded(write, tmp_path, monkeypatch, text_model, tokenizer):
    monkeypatch.setattr("segalign.text.feature_store._MAX_OPEN_FILES", 2)
    assert write().num_shards > 3
    store = FeatureStore.open(tmp_path / "store")
    SegmentEncoder(text_model, tokenizer, store=store)(usable())
    assert len(store._open_files) == 2


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage", "error"),
    [
        ("store.json", lambda path: path.unlink(), ConfigError),
        ("store.json", lambda path: path.write_text("[]"), DataError),
        ("store.json", lambda path: path.write_text('{"format": "other"}'), DataError),
        ("index.safetensors", cut, DataError),
        ("index.safetensors", lambda path: path.unlink(), DataError),
        ("features-00000.safetensors", cut, DataError),
        ("features-00000.safetensors", lambda path: path.unlink(), DataError),
    ],
)
def test_damage_is_reported_in_one_line(write, tmp_path, name, damage, error):
    write()
    damage(tmp_path / "store" / name)
    with pytest.raises(error, match=r"store\.json|index|features-00000") as report:
        FeatureStore.open(tmp_path / "store").get((49406, 49407))
    assert "\n" not in str(report.value)


def test_captions_are_read_from_any_sample_on(captions):
    assert [str(c) for c in captions.read(38)] == [str(c) for c in captions.read()][38:]
    assert next(captions.read(42)) == CAPTIONS[42].strip()
    assert str(next(captions.read(40))) == "caption_empty: the caption is empty"


def test_a_damaged_caption_is_set_aside(captions, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in captions.folder.iterdir():
        content = path.read_bytes().replace(b"The house has 0 trees", b"The house has X trees")
        (folder / path.name).write_bytes(content)
    from segalign.data.manifest import load_manifest

    faults = [c for c in CaptionStream(load_manifest(folder)).read() if not isinstance(c, str)]
    assert [fault.reason for fault in faults] == ["caption_empty", "caption_empty", "checksum"]


def test_equal_first_halves_are_told_apart():
    high = np.array([-5, 3, 3, 3, 9])
    low = np.array([0, -1, 4, 7, 0])
    index = DigestIndex(high, low)
    assert [index.find((3, part)) for part in (-1, 4, 7, 5)] == [1, 2, 3, None]
    assert [index.find((number, 0)) for number in (-5, 9, -6, 10)] == [0, 4, None, None]


def test_a_set_of_digests_grows_beyond_its_recent_part():
    digests = [digest_ids((number,)) for number in range(70_000)]
    known = DigestSet()
    for digest in digests[:-5]:
        known.add(digest)
    assert len(known._recent) < 2**16
    assert all(digest in known for digest in digests[:-5:97])
    assert not any(digest in known for digest in digests[-5:])


def test_digests_are_128_bits_of_the_ids():
    assert digest_ids((1, 2)) != digest_ids((2, 1)) != digest_ids((1, 2, 0))
    assert all(-(2**63) <= part < 2**63 for part in digest_ids((49406, 49407)))


def test_a_file_of_features_says_how_far_it_goes(write, tmp_path):
    write()
    with safe_open(tmp_path / "store" / "features-00000.safetensors", "pt") as file:
        state = json.loads(file.metadata()["state"])
        assert 0 < state["next_sample"] < 40
        assert state["next_sample"] % 8 == 0
        assert file.get_slice("rows").get_shape()[1] == 32


def test_long_captions_make_small_batches(monkeypatch):
    monkeypatch.setattr(store_writer, "_MAX_BATCH_CHARS", 10)
    batches = store_writer._batches(iter(["a" * 9, "b", "c" * 30, "d", "e"]))
    assert [len(batch) for batch in batches] == [2, 1, 2]


def test_another_way_to_split_is_told(write, make_text_model, tokenizer, tmp_path, caplog):
    class Own(SentenceSegmenter):
        pass

    write()
    store = FeatureStore.open(tmp_path / "store")
    SegmentEncoder(make_text_model(), tokenizer, store=store)
    assert caplog.text == ""
    for segmenter in (OfficialSegmenter(), Own()):
        caplog.clear()
        SegmentEncoder(make_text_model(), tokenizer, store=store, segmenter=segmenter)
        assert "holds segments of ({'name': 'sentence'}, 'cut_further'); captions" in caplog.text
