import json
import subprocess
import sys

import pytest

import main
from segalign.commands.stats import read_extractor
from segalign.errors import ConfigError
from segalign.metrics.extractors.tiny import TinyExtractor
from segalign.metrics.reference_files import load_reference


def run(*argv):
    return main.main(["stats", *map(str, argv)])


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    from segalign.data.packing import pack
    from segalign.data.scene_shards import SceneSource

    folder = tmp_path_factory.mktemp("scenes") / "shards"
    pack(SceneSource("2x2", 6), folder)
    return folder


@pytest.fixture
def shards(packed, tmp_path):
    import shutil

    return shutil.copytree(packed, tmp_path / "shards")


TINY = ["--extractor", "tiny", "--extractor_args.num_features", "8", "--device", "cpu"]


def test_they_are_computed_then_found_then_shown(shards, capsys):
    assert run("compute", shards, *TINY, "--image_size", "20") == 0
    shown = capsys.readouterr()
    (path,) = (shards / "statistics").iterdir()
    line = "6 images at 20 px (6 png; 0 left out), sums and features of each, 8 features of tiny"
    assert shown.out.startswith(f"computed: {line}")
    assert shown.out.endswith(f"; see {path}\n")
    assert "looking: 6 of 6" in shown.err
    assert run("compute", shards, *TINY, "--image_size", "20") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"already there: {line}")
    assert "looking" not in shown.err
    assert run("show", path) == 0
    first, _, rest = capsys.readouterr().out.partition("\n")
    assert first.startswith(line)
    assert json.loads(rest) == load_reference(path).protocol
    assert json.loads(rest)["extractor"] == TinyExtractor(num_features=8).load().protocol()


def test_a_file_can_be_named(shards, tmp_path, capsys):
    out = tmp_path / "new" / "real.safetensors"
    options = ["--count", "4", "--batch_size", "3", "--sums_only", "--out", out]
    for word in ("computed", "already there"):
        assert run("compute", shards, *TINY, *options) == 0
        assert capsys.readouterr().out.startswith(f"{word}: 4 images at their own size (4 png; 0")
    assert load_reference(out).rows is None
    assert not (shards / "statistics").exists()
    assert run("compute", shards, *TINY, "--count", "5", "--sums_only", "--out", out) == 65
    error = capsys.readouterr().err
    assert "`images.first` is 5 in one and 4 in the other" in error
    assert error.count("\n") == 1
    assert run("compute", shards, *TINY, "--count", "4", "--out", out) == 65
    assert "expected reference statistics with features of each image" in capsys.readouterr().err


def test_the_grid_can_be_coarser(shards, tmp_path, capsys):
    out = tmp_path / "real.safetensors"
    assert run("compute", shards, *TINY, "--grid_bits", "9", "--out", out) == 0
    assert load_reference(out).statistics.grid_bits == 9
    assert run("compute", shards, *TINY, "--out", out) == 65
    assert "`grid_bits` is 12 in one and 9 in the other" in capsys.readouterr().err


def test_samples_that_are_left_out_are_named(shards, capsys):
    tar = shards / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"caption":"', b'"caption":1', 1))
    assert run("compute", shards, *TINY) == 0
    shown = capsys.readouterr()
    assert "5 images at their own size (5 png; 1 left out)" in shown.out
    assert "left out: shard-000000.tar, key 000000000: checksum\n" in shown.err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], 78, "expected a sub-command of `main.py stats`, one of compute, show; got none"),
        (["compute", "SHARDS"], 78, "extractor"),
        (["compute", "NOWHERE", *TINY], 65, "a folder of shards was expected; `NOWHERE` is none"),
        (["compute", "SHARDS", *TINY, "--count", "7"], 78, "expected `count` of reference images"),
        (["compute", "SHARDS", *TINY, "--out", "x.pt"], 78, "ends in `.safetensors`; got `x.pt`"),
        (["compute", "SHARDS", *TINY, "--image_size", "0"], 78, "Not of type PositiveInt"),
        (
            ["compute", "SHARDS", "--extractor", "fid"],
            78,
            "to be one of inception, tiny, or a clas",
        ),
        (
            ["compute", "SHARDS", "--extractor", "os.system"],
            78,
            "configs may not name `os.system`, which could run any code",
        ),
        (
            ["compute", "SHARDS", "--extractor", "timm.models.vision_transformer"],
            78,
            "If you trust the package, add `--allow_import timm` to the command line",
        ),
        (
            ["compute", "SHARDS", "--extractor", "segalign.data.manifest.Manifest"],
            78,
            "does not implement protocol",
        ),
        (
            ["compute", "SHARDS", *TINY, "--extractor_args.colour", "red"],
            78,
            "Option 'colour' is not accepted",
        ),
        (
            ["compute", "SHARDS", "--extractor", "segalign.scenes.scorers.ScenesScorer"],
            78,
            "expected an extractor of features; `segalign.scenes.scorers.ScenesScorer` loads a",
        ),
        (["show", "x.safetensors"], 65, "expected reference statistics in `x.safetensors`; got no"),
    ],
)
def test_errors_are_one_line_with_a_code(
    packed, tmp_path, monkeypatch, capsys, argv, code, message
):
    monkeypatch.chdir(tmp_path)
    assert run(*(packed if word == "SHARDS" else word for word in argv)) == code
    error = capsys.readouterr().err
    assert message in error
    assert [line for line in error.splitlines() if line.startswith("error: ")] == [error.strip()]


@pytest.mark.parametrize("made", ["os.PathLike", "fractions.Fraction"])
def test_class_paths_in_settings_are_restricted_too(made):
    settings = {"part": {"class_path": made, "init_args": {"numerator": 3}}}
    with pytest.raises(ConfigError, match=f"configs may not name `{made}`"):
        read_extractor("toy_extractor.HoldsAnything", settings, ["toy_extractor"])


def test_packages_are_permitted_for_one_command_alone():
    assert read_extractor("toy_extractor.HoldsAnything", {}, ["toy_extractor"])
    with pytest.raises(ConfigError, match="add `--allow_import toy_extractor`"):
        read_extractor("toy_extractor.HoldsAnything", {})


def test_an_extractor_may_be_a_class_path():
    source = read_extractor("segalign.metrics.extractors.tiny.TinyExtractor", {"seed": 3})
    assert (type(source), source.seed) == (TinyExtractor, 3)


@pytest.mark.parametrize("argv", [["--help"], ["compute", "--help"]])
def test_help_imports_neither_torch_nor_lightning(repository, argv):
    code = (
        "import sys\nfrom segalign.commands.stats import run\n"
        f"try: run({argv})\nexcept SystemExit: pass\n"
        "assert not {'torch', 'lightning', 'numpy', 'PIL'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True, capture_output=True)
