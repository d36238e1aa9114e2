"""Samples set apart: which, and that they are the same bytes."""

import pytest

import main
from segalign.data.manifest import load_manifest
from segalign.data.reader import ShardFiles
from segalign.data.splitting import ShardSource, choose_samples
from segalign.data.verify import verify_shards
from segalign.errors import ConfigError


def contents(folder) -> list[dict[str, bytes]]:
    files = ShardFiles(folder)
    return [
        {m.suffix: files.read(shard.name, m.offset, m.size) for m in sample.members}
        for shard, sample in load_manifest(folder)
    ]


def test_every_sample_goes_to_one_of_two_places_unchanged(tmp_path, write_shards, capsys):
    write_shards(tmp_path / "all", [10, 10, 5])
    out, rest = tmp_path / "held_out", tmp_path / "rest"
    argv = ["split", str(tmp_path / "all"), str(out), "--count", "7", "--rest", str(rest)]
    assert main.main(["shards", *argv, "--samples-per-shard", "4"]) == 0
    assert "num packed  7" in capsys.readouterr().out
    chosen, others = contents(out), contents(rest)
    assert (len(chosen), len(others)) == (7, 18)
    every = contents(tmp_path / "all")
    assert sorted(map(repr, chosen + others)) == sorted(map(repr, every))
    assert list(chosen[0]) == ["png", "json"]
    assert verify_shards(out, decode=True).is_sound
    assert [shard.num_samples for shard in load_manifest(out).shards] == [4, 3]


def test_a_choice_depends_on_seed_and_keys_alone(tmp_path, write_shards):
    one = write_shards(tmp_path / "one", [40])
    many = write_shards(tmp_path / "many", [5, 30, 5])
    chosen = choose_samples(one, 10, seed=3, choice="random")
    assert chosen == choose_samples(many, 10, seed=3, choice="random")
    assert chosen != choose_samples(one, 10, seed=4, choice="random")
    assert set(chosen) < set(choose_samples(one, 20, seed=3, choice="random"))
    assert chosen != list(range(10))
    assert choose_samples(one, 3, seed=3, choice="first") == [0, 1, 2]


def test_a_choice_is_even(tmp_path, write_shards):
    shards = write_shards(tmp_path / "x", [400])
    halves = [
        sum(one < 200 for one in choose_samples(shards, 100, seed=seed, choice="random"))
        for seed in range(20)
    ]
    assert 45 < sum(halves) / 20 < 55  # 50, standard deviation 0.97
    assert len(set(halves)) > 3


def test_damaged_samples_are_set_aside(tmp_path, write_shards, capsys):
    write_shards(tmp_path / "all", [4])
    shard = tmp_path / "all" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"caption 1", b"caption X"))
    argv = ["split", str(tmp_path / "all"), str(tmp_path / "out"), "--count", "3"]
    assert main.main(["shards", *argv, "--choice", "first"]) == 0
    shown = capsys.readouterr().out
    assert "checksum: 1" in shown
    assert "shard-000000.tar, key 000001 | checksum" in shown
    assert len(contents(tmp_path / "out")) == 2


def test_too_many_samples_and_folders_twice_are_refused(tmp_path, write_shards, capsys):
    manifest = write_shards(tmp_path / "all", [4])
    with pytest.raises(ConfigError, match=r"expected `--count` below the 4 samples of .*got 4"):
        choose_samples(manifest, 4, seed=0, choice="first")
    folder = str(tmp_path / "all")
    assert main.main(["shards", "split", folder, folder + "/../all", "--count", "1"]) == 78
    assert "expected different folders to read and to write" in capsys.readouterr().err


def test_other_choices_are_other_shards(tmp_path, write_shards):
    manifest = write_shards(tmp_path / "all", [4])
    settings = [ShardSource(manifest, ids).settings() for ids in ([0, 1], [0, 2])]
    assert settings[0] != settings[1]
