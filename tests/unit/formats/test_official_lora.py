import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from segalign.errors import DataError, StorageError
from segalign.formats.official_lora import (
    match_official_lora,
    official_targets,
    read_official_lora,
    write_official_lora,
)

FILE = "lora_vis.pt"


def flat(pairs):
    return [part for pair in pairs.values() for part in pair]


@pytest.fixture
def path(tmp_path):
    return tmp_path / FILE


def refused(path):
    with pytest.raises(DataError) as caught:
        read_official_lora(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_targets_are_layers_of_resnets_attention_and_geglu_alone(unet):
    paths = [target.path for target in official_targets(unet)]
    endings = {path.rpartition("s.")[2].partition(".")[2] or path for path in paths}
    assert not {"proj_in", "proj_out", "conv"} & {path.rpartition(".")[2] for path in paths}
    assert not any(path.endswith("ff.net.2") or path.startswith("time_emb") for path in paths)
    assert {"conv1", "conv2", "conv_shortcut", "time_emb_proj"} <= endings
    first_resnet = next(i for i, path in enumerate(paths) if ".resnets." in path)
    assert all(".attentions." in path for path in paths[:first_resnet])
    assert paths[first_resnet].startswith("down_blocks.0.")
    blocks = [path.partition(".")[0] for path in paths]
    assert list(dict.fromkeys(blocks)) == ["down_blocks", "up_blocks", "mid_block"]


def test_targets_see_through_peft_layers(make_unet, peft_unet):
    assert official_targets(peft_unet) == official_targets(make_unet())


def test_written_list_is_read_back_to_float16(path, unet, make_pairs):
    pairs = make_pairs(unet)
    write_official_lora(dict(reversed(pairs.items())), unet, path)
    tensors = read_official_lora(path)
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in tensors)
    assert all(
        torch.equal(t, part.half().float()) for t, part in zip(tensors, flat(pairs), strict=True)
    )
    assert list(match_official_lora(tensors, unet)) == list(pairs)


def test_written_file_is_what_the_official_code_writes(path, unet, make_pairs):
    write_official_lora(make_pairs(unet), unet, path)
    content = torch.load(path, weights_only=True)
    assert type(content) is list
    assert {(tensor.dtype, tensor.is_contiguous()) for tensor in content} == {(torch.float16, True)}
    with zipfile.ZipFile(path) as archive:
        stored = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    for name in (b"_rebuild_tensor_v2", b"HalfStorage", b"OrderedDict"):
        assert name in stored
    assert list(path.parent.iterdir()) == [path]


def test_tensors_with_gradient_are_detached(path, unet, make_pairs):
    torch.save([torch.nn.Parameter(part.half()) for part in flat(make_pairs(unet))], path)
    assert not any(tensor.requires_grad for tensor in read_official_lora(path))


@pytest.mark.parametrize("form", ["list", "legacy", "protocol 2", "protocol 4"])
def test_code_in_a_pickle_never_runs(path, payload, form):
    if form.startswith("protocol"):
        path.write_bytes(pickle.dumps(payload, protocol=int(form[-1])))
    else:
        torch.save([payload], path, _use_new_zipfile_serialization=form == "list")
    message = refused(path)
    assert not payload.mark.exists()
    if form != "protocol 4":  # which is refused before its names are looked at
        assert "mkdir`, which could run code and was not loaded" in message
    # The payload is live: a reader without the restriction runs it.
    pickle.loads(pickle.dumps(payload))
    assert payload.mark.exists()


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.95])
def test_truncated_file(path, unet, make_pairs, kept):
    write_official_lora(make_pairs(unet), unet, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    assert "a damaged or foreign file" in refused(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"a": torch.ones(2, 2)}, "got a dict;"),
        ([], "got a list of no tensors"),
        (torch.ones(2, 2), "got a Tensor;"),
        ([torch.ones(2, 2), 3], "a list with a int of another kind at 1"),
        ([torch.ones(2, 2), torch.ones(2, 2).int()], "a list with a Tensor of another kind at 1"),
        ([torch.ones(2, 2)] * 3, "3 tensors, an odd number"),
    ],
)
def test_content_that_is_no_list_of_pairs(path, content, found):
    torch.save(content, path)
    assert found in refused(path)


def test_numbers_that_are_not_finite(path):
    torch.save([torch.ones(2, 2), torch.tensor([[1.0, float("nan")]])], path)
    assert "tensor 1 has others" in refused(path)


def test_missing_file(path):
    assert "there is none" in refused(path)


def test_named_tensors_are_read_by_their_numbers(tmp_path):
    path = tmp_path / "list.safetensors"
    named = {
        f"{i:03d}.{'down' if i % 2 else 'up'}": torch.full((1, 1), float(i)) for i in range(12)
    }
    save_file(named, path)
    assert [int(tensor) for tensor in read_official_lora(path)] == list(range(12))
    save_file({"000.up": named["000.up"], "unet.x": named["001.down"]}, path)
    assert "keys other than `000.up`, `001.down`" in refused(path)
    path.write_bytes(path.read_bytes()[:-3])
    assert "expected a safetensors file" in refused(path)


def test_list_of_another_model(unet, make_unet, make_pairs):
    with pytest.raises(DataError, match=r"expected \d+ LoRA tensors for the \d+ layers .* got 2;"):
        match_official_lora(flat(make_pairs(unet))[:2], unet)
    wider = make_unet(cross_attention_dim=20)
    message = (
        r"expected up \(8, 3\) and down \(3, 20\) at position 5 "
        r"\(`down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k`\); "
        r"got \(8, 3\) and \(3, 12\)"
    )
    with pytest.raises(DataError, match=message):
        match_official_lora(flat(make_pairs(unet)), wider)


@pytest.mark.parametrize("shape", [(), (8,), (3, 8, 1, 1), (8, 0)])
def test_list_with_a_tensor_of_another_shape(unet, make_pairs, shape):
    tensors = flat(make_pairs(unet))
    tensors[0] = torch.ones(shape)
    with pytest.raises(DataError, match=r"at position 0 \("):
        match_official_lora(tensors, unet)
    tensors = flat(make_pairs(unet))
    tensors[1] = torch.ones(shape)
    with pytest.raises(DataError, match=r"at position 0 \("):
        match_official_lora(tensors, unet)


def test_list_of_several_ranks(unet, make_pairs):
    first, *_, last = make_pairs(unet)
    pairs = make_pairs(unet)
    for path in (first, last):
        pairs[path] = make_pairs(unet, rank=2)[path]
    with pytest.raises(DataError, match=rf"rank 2 in 2 layers, rank 3 in {len(pairs) - 2} layers"):
        match_official_lora(flat(pairs), unet)


def test_what_cannot_be_written(path, unet, make_pairs):
    pairs = make_pairs(unet)
    name = min(pairs)
    with pytest.raises(DataError, match=rf"`{name}` is missing"):
        write_official_lora({k: v for k, v in pairs.items() if k != name}, unet, path)
    with pytest.raises(DataError, match="`conv_in` is superfluous"):
        write_official_lora({**pairs, "conv_in": pairs[name]}, unet, path)
    with pytest.raises(DataError, match=rf"within float16 .* `{name}` exceeds it"):
        write_official_lora({**pairs, name: (pairs[name][0] + 7e4, pairs[name][1])}, unet, path)
    with pytest.raises(DataError, match=rf"at layer `{name}`"):
        write_official_lora({**pairs, name: pairs[name][::-1]}, unet, path)
    assert not path.exists()
    (path.parent / "file").touch()
    with pytest.raises(StorageError):
        write_official_lora(pairs, unet, path.parent / "file" / FILE)
