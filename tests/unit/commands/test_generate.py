"""``main.py generate``: images, going on, bad lines; the same from a run and from its export."""

import json
import os
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import STABLE_DIFFUSION, model_settings, write_run

from lightning_modules.run_loading import load_module
from segalign.commands import export, generate
from segalign.errors import ConfigError, DataError, NonFiniteError
from segalign.generation.own_files import lock_folder

LONG = "A red fox sits on a tall wall. " * 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, and its exported folder."""
    place = tmp_path_factory.mktemp("place")
    write_run(place / "run", model_settings(lora={"rank": 2}))
    out = str(place / "folder")
    options = ["--checkpoint", str(place / "run"), "--format", "diffusers", "--out", out]
    assert export.run(options, load_once) == 0
    return place


_LOADED = {}


def load_once(path, **options):
    """Load a run once for all tests; commands change nothing of a module but its sampler."""
    if path not in _LOADED:
        module = load_module(path, **options)
        _LOADED[path] = module, getattr(module, "sampler", None)
    module, module.sampler = _LOADED[path]
    return module


def make(place, out, *options, source="run"):
    arguments = ["--checkpoint", str(place / source), "--out", str(out), "--device", "cpu"]
    return generate.run([*arguments, *options], load_once)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def images(out):
    return sorted(path.name for path in out.glob("*.png"))


def test_images_records_and_page(place, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    records = [{"prompt": "A fox."}, {"caption": LONG, "id": "wall"}, {"prompt": "B.", "seed": 9}]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = tmp_path / "out"
    assert make(place, out, "--prompt-file", str(prompts), "--seeds", "0", "3") == 0
    assert images(out) == [
        "00000000-s0.png", "00000000-s3.png", "00000001-s0.png", "00000001-s3.png",
        "00000002-s9.png",
    ]  # fmt: skip
    lines = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == images(out)
    assert (lines[2]["id"], lines[2]["prompt"], lines[2]["weights"]) == ("wall", LONG, "ema")
    assert (lines[0]["sampler"], lines[0]["steps"], lines[0]["guidance"]) == ("ddim", 2, 2.0)
    html = (out / "index.html").read_text()
    HTMLParser().feed(html)
    assert html.count("<img") == 5
    assert "dropped</span>" in html
    assert "made 5 images, kept 0" in capsys.readouterr().out


def test_an_image_does_not_depend_on_its_batch(place, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A fox.\n" + LONG + "\nB.\n")
    for size in ("1", "3"):
        make(place, tmp_path / size, "--prompt-file", str(prompts), "--batch-size", size)
    for name in images(tmp_path / "1"):
        difference = pixels(tmp_path / "1" / name) - pixels(tmp_path / "3" / name)
        assert abs(difference).max() <= 1
    assert abs(pixels(tmp_path / "1" / images(tmp_path / "1")[0])).max() > 0


def test_a_run_and_its_export_make_the_same(place, tmp_path):
    options = ("--prompt", "A fox.", "--prompt", LONG, "--sampler", "unipc", "--steps", "3")
    make(place, tmp_path / "run", *options)
    make(place, tmp_path / "folder", *options, source="folder")
    for name in images(tmp_path / "run"):
        assert abs(pixels(tmp_path / "run" / name) - pixels(tmp_path / "folder" / name)).max() <= 1
    raw = tmp_path / "raw"
    make(place, raw, *options, "--weights", "raw")
    assert abs(pixels(raw / images(raw)[1]) - pixels(tmp_path / "run" / images(raw)[1])).max() > 1
    with pytest.raises(ConfigError, match="no `--weights` for the exported folder"):
        make(place, tmp_path / "folder", *options, "--weights", "ema", source="folder")


def test_a_half_done_folder_goes_on_and_others_are_refused(place, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--prompt", "A fox.", "--prompt", "B.", "--num-images", "2")
    make(place, out, *options)
    before = {name: (out / name).read_bytes() for name in images(out)}
    (out / "00000001-s1.png").unlink()
    os.utime(out / "00000000-s0.png", (1, 1))
    assert make(place, out, *options) == 0
    assert "made 1 images, kept 3" in capsys.readouterr().out
    assert {name: (out / name).read_bytes() for name in images(out)} == before
    assert (out / "00000000-s0.png").stat().st_mtime == 1  # not written again
    with pytest.raises(ConfigError, match="made with steps 2, not 3"):
        make(place, out, *options, "--steps", "3")
    with pytest.raises(ConfigError, match=r"made with guidance 2\.0, not 1\.0"):
        make(place, out, *options, "--guidance", "1")
    with pytest.raises(ConfigError, match="shows another prompt"):
        make(place, out, "--prompt", "C.")
    with pytest.raises(ConfigError, match="made with checkpoint"):
        make(place, out, *options, source="folder")
    assert {name: (out / name).read_bytes() for name in images(out)} == before
    assert make(place, out, "--prompt", "C.", "--overwrite") == 0
    assert images(out) == ["00000000-s0.png"]


def test_an_interrupted_command_leaves_whole_images_and_their_records(place, tmp_path, monkeypatch):
    from segalign.generation.image_folder import ImageFolder

    out, write, written = tmp_path / "out", ImageFolder.write, []

    def write_twice(self, job, image):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(job)
        write(self, job, image)

    monkeypatch.setattr(ImageFolder, "write", write_twice)
    options = ("--prompt", "A.", "--num-images", "3", "--batch-size", "1")
    with pytest.raises(KeyboardInterrupt):
        make(place, out, *options)
    assert images(out) == ["00000000-s0.png", "00000000-s1.png"]
    assert len((out / "images.jsonl").read_text().splitlines()) == 2
    assert (out / "index.html").read_text().count("<img") == 2


def test_bad_lines_are_named_and_the_rest_done(place, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(b'{"prompt": "A."}\nnonsense\n{"prompt": "\xff"}\n{"prompt": "D."}\n')
    out = tmp_path / "out"
    with pytest.raises(DataError, match="2 of 4 lines hold none, the first being line 2") as error:
        make(place, out, "--prompt-file", str(prompts))
    assert error.value.exit_code == 65
    assert images(out) == ["00000000-s0.png", "00000003-s0.png"]
    printed = capsys.readouterr().err
    assert f"skipping {prompts}:2: expected JSON" in printed
    assert f"skipping {prompts}:3: expected UTF-8; got byte 0xff" in printed


@pytest.mark.parametrize("prompt", ["", "\0 \ud800", "null", "...", "{a: 1}"])
def test_any_prompt_makes_an_image(place, tmp_path, prompt):
    assert make(place, tmp_path, f"--prompt={prompt}") == 0
    assert images(tmp_path) == ["00000000-s0.png"]
    line = (tmp_path / "images.jsonl").read_text()
    assert json.loads(line)["prompt"] == prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either by `--prompt` or by `--prompt-file`; got none"),
        (["--prompt", "A.", "--prompt-file", "x"], "got both"),
        (["--prompt-file", "nowhere.txt"], r"prompts file at `nowhere\.txt`; got: No such file"),
        (["--prompt", "A.", "--seeds", "1", "--num-images", "2"], "`--seeds` or `--num-images`"),
        (["--prompt", "A.", "--steps", "0"], "steps"),
        (["--prompt", "A.", "--steps", "2000"], "2000"),
        (["--prompt", "A.", "--device", "abacus"], "got `abacus`. Choose another `--device`"),
        (["--prompt", "A.", "--device", "meta"], "got `meta`. Choose another `--device`"),
        (
            ["--prompt", "A.", "--seeds", str(2**63)],
            r"`--seeds` in \[0, 2\^63\); got 9223372036854",
        ),
        (["--prompt", "A.", "--sampler", "euler"], "euler"),
        (["--prompt", "A.", "--colour", "red"], "colour"),
    ],
)
def test_settings_that_cannot_work(place, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        make(place, tmp_path / "out", *options)


def test_sources_that_cannot_be_used(place, tmp_path):
    message = (
        r"`--checkpoint` to be a .*; found nothing at .*step-00001000`, or .*best`"  # and no `auto`
    )
    with pytest.raises(ConfigError, match=message):
        make(place, tmp_path / "out", "--prompt", "A.", source="nowhere")
    plain = tmp_path / "plain"
    for part in ("unet", "vae"):
        (plain / part).mkdir(parents=True)
    for index in (None, '{"_class_name": "StableDiffusionPipeline", "unet": []}'):
        if index is not None:
            (plain / "model_index.json").write_text(index)
        with pytest.raises(ConfigError, match=r"a plain model of diffusers.*longsd --base .*plain"):
            make(tmp_path, tmp_path / "out", "--prompt", "A.", source="plain")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(DataError, match=r"a whole folder that `main\.py export` has written"):
        make(tmp_path, tmp_path / "out", "--prompt", "A.", source=".")
    scorer = {"class_path": "toy_house.ToyModule", "init_args": {}}
    write_run(place / "toy", scorer, ema=False, allow_import=["toy_house"])
    with pytest.raises(ConfigError, match=r"a model that makes images in .*; got `ToyModule`"):
        make(place, tmp_path / "o", "--prompt=A.", "--allow_import=toy_house", source="toy")
    assert not (tmp_path / "out").exists()


def test_the_largest_seed_makes_an_image(place, tmp_path):
    assert make(place, tmp_path, "--prompt=A.", "--seeds", str(2**63 - 1)) == 0
    assert images(tmp_path) == [f"00000000-s{2**63 - 1}.png"]


def recorded(out):
    return {json.loads(line)["dtype"] for line in (out / "images.jsonl").read_text().splitlines()}


def test_a_named_precision_changes_run_and_export_alike(place, tmp_path):
    for source in ("run", "folder"):
        made = {}
        for dtype in (None, "float32", "bfloat16"):
            out = tmp_path / f"{source}-{dtype}"
            options = () if dtype is None else ("--dtype", dtype)
            make(place, out, "--prompt", LONG, "--seeds", "5", *options, source=source)
            assert recorded(out) == {dtype or "float32"}
            made[dtype] = pixels(out / images(out)[0])
        assert (made["float32"] == made[None]).all()
        assert 0 < abs(made["bfloat16"] - made[None]).max() <= 20
    difference = [pixels(tmp_path / f"{s}-bfloat16" / "00000000-s5.png") for s in ("run", "folder")]
    assert abs(difference[0] - difference[1]).max() <= 8


def test_precision_of_a_bfloat16_run_is_told_and_can_be_widened(tmp_path):
    base = {**STABLE_DIFFUSION, "init_args": {**STABLE_DIFFUSION["init_args"], "dtype": "bfloat16"}}
    write_run(tmp_path / "run", model_settings(base, lora={"rank": 2}))
    export.run([
        "--checkpoint", str(tmp_path / "run"), "--format", "diffusers",
        "--out", str(tmp_path / "folder"),
    ], load_module)  # fmt: skip
    made = {}
    for source in ("run", "folder"):
        for dtype in (None, "bfloat16", "float32"):
            out = tmp_path / f"{source}-{dtype}"
            options = [] if dtype is None else ["--dtype", dtype]
            generate.run([
                "--checkpoint", str(tmp_path / source), "--out", str(out), "--prompt=A fox.",
                "--device=cpu", *options,
            ], load_module)  # fmt: skip
            made[source, dtype] = recorded(out), pixels(out / "00000000-s0.png")
    assert made["run", None][0] == {"bfloat16+float32"}  # the second of LoRA
    assert made["folder", None][0] == {"bfloat16"}
    assert (made["folder", None][1] == made["folder", "bfloat16"][1]).all()
    for source in ("run", "folder"):
        assert made[source, "float32"][0] == {"float32"}
        assert abs(made[source, "float32"][1] - made[source, None][1]).max() > 0
    assert abs(made["run", "float32"][1] - made["folder", "float32"][1]).max() <= 1


def test_a_changed_folder_is_refused(place, tmp_path):
    folder = shutil.copytree(place / "folder", tmp_path / "folder")
    options = ("--prompt=A.", "--steps=1")
    (folder / "README.md").write_text("# My model\n")  # for people, not for the model
    assert make(tmp_path, tmp_path / "out", *options, source="folder") == 0
    config = folder / "segment_encoder" / "config.json"
    config.write_text(config.read_text().replace('"token_budget": 64', '"token_budget": 32'))
    with pytest.raises(
        DataError, match=r"as it was written; `segment_encoder/config\.json` differs"
    ):
        make(tmp_path, tmp_path / "out", *options, source="folder")


def test_images_that_are_not_finite_are_named_and_the_others_made(place, tmp_path, capsys):
    module = load_once(place / "run" / "checkpoints" / "step-00000003", device=torch.device("cpu"),
                       allow_import=[])  # fmt: skip
    decode = module.codec.decode

    def decode_badly(latents):
        decoded = decode(latents)
        decoded[1, 0, 0, 0] = float("nan")
        return decoded

    module.codec.decode = decode_badly
    try:
        with pytest.raises(NonFiniteError, match="NaN in 1 of 3, the first of prompt 0, seed 1"):
            make(place, tmp_path, "--prompt=A.", "--num-images=3")
    finally:
        del module.codec.decode
    assert NonFiniteError.exit_code == 70
    printed = capsys.readouterr()
    assert "skipping prompt 0, seed 1: its image is not finite" in printed.err
    assert "made 2 images, kept 0" in printed.out
    assert images(tmp_path) == ["00000000-s0.png", "00000000-s2.png"]
    assert (tmp_path / "index.html").read_text().count("<img") == 2
    assert make(place, tmp_path, "--prompt=A.", "--num-images=3") == 0
    assert "made 1 images, kept 2" in capsys.readouterr().out


def test_files_of_others_survive_overwriting_and_two_commands_do_not_mix(place, tmp_path):
    out = tmp_path / "out"
    with lock_folder(out), pytest.raises(OSError, match="is at work in it"):
        make(place, out, "--prompt=A.")
    (out / "index.html").write_text("mine")
    with pytest.raises(ConfigError, match=r"index\.html` to be missing or made by"):
        make(place, out, "--prompt=A.", "--overwrite")
    assert sorted(path.name for path in out.iterdir()) == [".generate.lock", "index.html"]
