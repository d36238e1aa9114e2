import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from tokenizers import Tokenizer, models
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from segalign.commands import import_weights
from segalign.diffusion.long_text_pipeline import LongTextPipeline
from segalign.diffusion.model_sizes import random_parts
from segalign.error_boundary import run_guarded
from segalign.formats import long_sd
from segalign.formats.base_unet import unet_structure
from segalign.formats.lora_pairs import merge_lora
from segalign.formats.official_lora import official_targets, write_official_lora
from segalign.formats.peft_lora import load_diffusers_lora
from segalign.text.adapter import TextAdapter, load_adapter, save_adapter
from segalign.text.t5_models import random_t5


def run(*argv):
    return run_guarded(lambda: import_weights.run([str(part) for part in argv]))


def make_pairs(unet, seed=0, rank=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        target.path: tuple(
            torch.randn(shape, generator=generator).half().float() * 0.25
            for shape in target.pair_shapes(rank)
        )
        for target in official_targets(unet)
    }


@pytest.fixture
def base(tmp_path):
    """A tiny model in diffusers layout."""
    parts, folder = random_parts("tiny", seed=1, device=torch.device("cpu")), tmp_path / "base"
    parts.unet.save_pretrained(folder / "unet")
    parts.vae.save_pretrained(folder / "vae")
    parts.text_models.text_model.save_pretrained(folder / "text_encoder")
    parts.text_models.tokenizer.save_pretrained(folder / "tokenizer")
    DDPMScheduler(**parts.scheduler_config).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def lora(tmp_path):
    unet = unet_structure("tiny")
    write_official_lora(make_pairs(unet), unet, tmp_path / "lora_vis.pt")
    return tmp_path / "lora_vis.pt"


@pytest.fixture
def t5(tmp_path):
    random_t5("tiny").save_pretrained(tmp_path / "t5")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


@pytest.fixture
def adapter(tmp_path):
    torch.manual_seed(2)
    adapter = TextAdapter(48, 40, 32)
    save_adapter(adapter, tmp_path / "adapter")
    return adapter


@pytest.mark.parametrize("from_folder", [True, False])
def test_lora(capsys, tmp_path, base, lora, from_folder):
    out = tmp_path / "out"
    assert run("lora", lora, "--base", base if from_folder else "tiny", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "rank        2\n" in printed
    assert f"{out}/pytorch_lora_weights.safetensors" in printed
    unet = unet_structure("tiny")
    pairs = load_diffusers_lora(out, unet)
    expected = make_pairs(unet)
    assert pairs.keys() == expected.keys()
    assert all(torch.equal(a, b) for k in pairs for a, b in zip(pairs[k], expected[k], strict=True))


def test_lora_of_stable_diffusion_needs_no_weights(tmp_path):
    unet = unet_structure("sd15")
    pairs = make_pairs(unet, rank=1)
    write_official_lora(pairs, unet, tmp_path / "lora_vis.pt")
    assert run("lora", tmp_path / "lora_vis.pt", "--out", tmp_path / "out") == 0
    assert len(load_diffusers_lora(tmp_path / "out", unet)) == 224


def test_adapter(capsys, tmp_path, adapter):
    assert run("adapter", tmp_path / "adapter", "--out", tmp_path / "out") == 0
    assert "48 to 40 to 32" in capsys.readouterr().out
    ours, theirs = load_adapter(tmp_path / "out").state_dict(), adapter.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_denscore(capsys, tmp_path):
    tower = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = {**tower, "image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=tower, vision_config=vision, projection_dim=6))
    model.save_pretrained(tmp_path / "scorer")
    assert run("denscore", tmp_path / "scorer", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "32 x 32 pixels" in printed
    assert "model.safetensors" in printed
    CLIPModel.from_pretrained(tmp_path / "out")


@pytest.fixture
def long_sd_arguments(tmp_path, base, t5, adapter, lora):
    second, unet = tmp_path / "second.pt", unet_structure("tiny")
    write_official_lora(make_pairs(unet, seed=1, rank=3), unet, second)
    parts = {"--base": base, "--t5": t5, "--adapter": tmp_path / "adapter", "--lora": lora}
    return [part for pair in parts.items() for part in pair] + ["--lora", second]


def test_long_sd_merges_all_stages(tmp_path, long_sd_arguments):
    out = tmp_path / "out"
    assert run("longsd", *long_sd_arguments, "--out", out) == 0
    pipeline = LongTextPipeline.from_pretrained(str(out))
    unet = random_parts("tiny", seed=1, device=torch.device("cpu")).unet
    merge_lora(unet, [make_pairs(unet), make_pairs(unet, seed=1, rank=3)])
    torch.testing.assert_close(
        dict(pipeline.unet.state_dict()), dict(unet.state_dict()), rtol=0, atol=1e-6
    )
    assert pipeline.sampler == long_sd.OFFICIAL_SAMPLER
    embeds = pipeline.encode_prompt("a. a a.").prompt_embeds
    assert embeds.shape == (1, 480, 32)


def test_long_sd_gives_the_image_of_its_folder(tmp_path, base, t5, adapter, lora):
    model = long_sd.load_long_sd(
        str(base), t5=str(t5), adapter=str(tmp_path / "adapter"), loras=[str(lora)]
    )
    long_sd.write_pipeline(model, tmp_path / "out", base="tiny", loras=[str(lora)])
    pipeline = LongTextPipeline.from_pretrained(str(tmp_path / "out"))
    sampler = replace(model.sampler, num_inference_steps=2)
    noise = model.generator.noise([0], 3)
    expected = model.generator.sample(["a. a a."], noise, sampler)
    image = pipeline("a. a a.", 2, latents=noise, output_type="pt").images
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "error: expected a sub-command of `main.py import`, one of lora, adapter, denscore"),
        (
            ["nonsense"],
            "error: argument lora | adapter | denscore | longsd: invalid choice: 'nonsense'",
        ),
        (["lora", "file"], "error: the following arguments are required"),
        (["lora", "f", "--out", "o", "--typo=c"], "error: unrecognized arguments"),
        (["lora", "none.pt", "--out", "o"], "error: expected a LoRA file at `none.pt`"),
        (["adapter", "./none", "--out", "o"], "error: expected the text adapter at `none`"),
        (["denscore", "no/where", "--out", "o"], "error: expected the scorer `no/where`"),
        (
            ["longsd", "--base", "./x", "--adapter", "a", "--lora", "l", "--out", "o"],
            "error: expected the text-to-image model at `./x`",
        ),
    ],
)
def test_errors_are_one_line_with_a_code(capsys, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    assert run(*argv) in (65, 78)
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_lora_of_another_model_writes_nothing(capsys, tmp_path, lora):
    assert run("lora", lora, "--base", "sd15", "--out", tmp_path / "out") == 65
    assert "expected 448 LoRA tensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", ["{", '{"block_out_channels": "x"}', '{"sample_size": [1, 2'])
def test_base_with_a_bad_config(capsys, base, tmp_path, lora, config):
    (base / "unet" / "config.json").write_text(config)
    capsys.readouterr()  # the progress bars of making the base
    assert run("lora", lora, "--base", base, "--out", tmp_path / "out") == 78
    error = capsys.readouterr().err
    assert "expected the config of a UNet in" in error
    assert error.count("\n") == 1


def test_existing_content_is_never_touched(capsys, tmp_path, lora):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert run("lora", lora, "--base", "tiny", "--out", tmp_path / "out") == 78
    assert "has content" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_arguments_are_read_without_torch(repository):
    code = (
        "import sys; from segalign.commands import import_weights as c; c.build_parser();"
        "print([m for m in ('torch', 'transformers', 'diffusers') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repository
    )
    assert json.loads(result.stdout.strip()) == []
