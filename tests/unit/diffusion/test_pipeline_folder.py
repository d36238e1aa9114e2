"""Exported folders: the images of the run, loaded by diffusers in two ways, nothing pickled."""

import copy
import dataclasses
import json
import logging
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import dynamic_modules_utils
from tiny_run import SCENES, STABLE_DIFFUSION, T5, model_settings, write_run

from lightning_modules.run_loading import load_module
from segalign.diffusion.guidance import Guidance
from segalign.diffusion.long_text_pipeline import LongTextPipeline
from segalign.diffusion.model_card import ModelCard
from segalign.diffusion.pipeline_folder import (
    check_files,
    make_pipeline,
    merge_adapters,
    save_pipeline_folder,
)
from segalign.diffusion.pipeline_parts import SegmentEncoding, make_scheduler
from segalign.diffusion.schedule import NoiseSchedule
from segalign.errors import ConfigError, DataError
from segalign.run_format import read_tensors
from segalign.text.settings import T5Branch, TextEncoding
from segalign.text.special_tokens import SpecialTokenPolicy
from segalign.text.windows import WindowSegmenter

CARD = ModelCard(
    base="a `base`", trained="LoRA", checkpoint="ab12", step=3, weights="ema", settings={"S": "x"}
)
LONG = "A red fox sits on a tall wall. " * 12
PROMPTS = ["A red fox. It sits on a wall!", "", LONG]
LORA = model_settings(
    STABLE_DIFFUSION, lora={"rank": 2},
    sampler={
        "num_inference_steps": 3, "guidance_scale": 3.0, "spacing": "leading",
        "guidance_interval": [0.3, 1.0], "guidance_interval_unit": "fraction",
        "guidance_rescale": 0.5,
    },
)  # fmt: skip
KINDS = {
    "scenes": model_settings(SCENES),
    "scenes, noise in each step": model_settings(
        SCENES, sampler={"num_inference_steps": 3, "guidance_scale": 1.0, "eta": float("inf")}
    ),
    "scenes, LoRA, text model": model_settings(
        SCENES, lora={"rank": 2}, train_text_model=True,
        text={"token_budget": 32, "mask_padding": True, "over_budget": "proportional",
              "segmenter": {"class_path": "segalign.text.clauses.ClauseSegmenter"},
              "policy": {"end": "keep", "pad": "eos"}},
    ),
    "Stable Diffusion": model_settings(STABLE_DIFFUSION, text={"kind": "truncated"}),
    "Stable Diffusion, LoRA": LORA,
    "Stable Diffusion, LoRA, T5": model_settings(STABLE_DIFFUSION, lora={"rank": 2}, text=T5),
}  # fmt: skip


def quiet_log(caplog):
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_makes_the_images_of_the_run(kind, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    write_run(tmp_path / "run", KINDS[kind])
    module = load_module(tmp_path / "run")
    with module.weights("ema"):
        save_pipeline_folder(module, tmp_path / "out", CARD)
    pipeline = LongTextPipeline.from_pretrained(tmp_path / "out")
    assert quiet_log(caplog) == []
    expected = module.generate(PROMPTS, [0, 1, 2], 7, "ema")
    assert (expected - module.generate(PROMPTS, [0, 1, 2], 7, "raw")).abs().max() > 1e-3
    assert (pipeline.generate(PROMPTS, [0, 1, 2], 7) - expected).abs().max() <= 1e-5
    called = pipeline(PROMPTS, seed=7, output_type="pt").images
    assert (called - expected).abs().max() <= 1e-5


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A loaded run with LoRA, and its exported folder; tests leave both as they are."""
    place = tmp_path_factory.mktemp("lora")
    write_run(place / "run", LORA)
    module = load_module(place / "run")
    save_pipeline_folder(module, place / "out", CARD)
    return module, place / "out"


@pytest.fixture
def pipeline(exported):
    return LongTextPipeline.from_pretrained(exported[1])


def test_the_sampler_survives(exported, pipeline):
    module, _ = exported
    assert pipeline.sampler == module.sampler
    assert pipeline.sampler.guidance == Guidance(
        scale=3.0, interval=(0.3, 1.0), interval_unit="fraction", rescale=0.5
    )
    earlier = {name: pipeline.config[name] for name in ("sampler", "guidance_scale", "spacing")}
    parts = {name: part for name, part in pipeline.components.items() if part is not None}
    # Folders of before hold no interval.
    assert LongTextPipeline(**parts, **earlier).sampler.guidance == Guidance(scale=3.0)


def test_everything_is_safe_and_recorded(exported):
    _, folder = exported
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert {name.rpartition(".")[2] for name in files} <= {"json", "safetensors", "md", "py", "txt"}
    assert [name for name in files if name.endswith(".py")] == ["pipeline.py"]
    record = json.loads((folder / "export.json").read_text())
    assert record["files"].keys() == set(files) - {"export.json"}
    assert record["checkpoint"] == "ab12"
    weights = read_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in weights)
    check_files(folder)


def test_diffusers_loads_it_by_its_own_code(exported, tmp_path, monkeypatch):
    module, folder = exported
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    pipeline = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=str(folder), trust_remote_code=True
    )
    assert type(pipeline) is LongTextPipeline
    image = pipeline.generate(PROMPTS[:1], [0], 7)
    assert (image - module.generate(PROMPTS[:1], [0], 7)).abs().max() <= 1e-5
    # The standard parts are those of any other pipeline.
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    assert unet.dtype == torch.float32
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())[
        "beta_schedule"
    ] == "scaled_linear"  # fmt: skip


BFLOAT16 = {**STABLE_DIFFUSION, "init_args": {
    **STABLE_DIFFUSION["init_args"], "dtype": "bfloat16",
}}  # fmt: skip


def test_the_parts_keep_the_precision_of_the_run(tmp_path, monkeypatch):
    """A bfloat16 run: the same up to what its own rounding does; widened, the same to 1e-5."""
    text = {**T5, "t5": {**T5["t5"], "dtype": "bfloat16"}, "token_budget": 64}
    sampler = {"num_inference_steps": 4, "guidance_scale": 3.0, "spacing": "leading"}
    settings = model_settings(BFLOAT16, lora={"rank": 2}, text=text, sampler=sampler)
    write_run(tmp_path / "run", settings, ema=False)
    module, folder = load_module(tmp_path / "run"), tmp_path / "out"
    save_pipeline_folder(module, folder, CARD)
    assert UNet2DConditionModel.from_pretrained(folder / "unet").dtype == torch.float32
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    pipeline = LongTextPipeline.from_pretrained(folder)
    by_diffusers = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=str(folder), trust_remote_code=True
    )
    for loaded in (pipeline, by_diffusers):
        networks = {n: p for n, p in loaded.components.items() if isinstance(p, torch.nn.Module)}
        dtypes = {name: {weight.dtype for weight in p.parameters()} for name, p in networks.items()}
        assert dtypes.pop("t5_adapter") == {torch.float32}
        assert dtypes.keys() == {"unet", "vae", "text_encoder", "t5_encoder"}
        assert all(found == {torch.bfloat16} for found in dtypes.values())
    run, exported = module.generate(PROMPTS, [0, 1, 2], 7), pipeline.generate(PROMPTS, [0, 1, 2], 7)
    assert torch.equal(by_diffusers.generate(PROMPTS, [0, 1, 2], 7), exported)
    wide = LongTextPipeline.from_pretrained(folder, dtype=torch.float32)
    torch.nn.Module.to(module, torch.float32)
    exact = module.generate(PROMPTS, [0, 1, 2], 7)
    assert (wide.generate(PROMPTS, [0, 1, 2], 7) - exact).abs().max() <= 1e-5
    assert (exported - run).abs().max() <= 0.06
    assert (exported - run).abs().mean() <= min(5e-3, 2 * (run - exact).abs().mean())


def test_merging_adds_up_times_down_and_leaves_the_network_alone(exported):
    module, _ = exported
    before = {name: tensor.clone() for name, tensor in module.unet.state_dict().items()}
    merged = merge_adapters(module.unet).state_dict()
    assert all(torch.equal(before[n], tensor) for n, tensor in module.unet.state_dict().items())
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    update = before[f"{layer}.lora_B.default.weight"] @ before[f"{layer}.lora_A.default.weight"]
    assert update.abs().max() > 1e-4
    expected = before[f"{layer}.base_layer.weight"] + update
    assert torch.allclose(merged[f"{layer}.weight"], expected, atol=1e-7)
    half = copy.deepcopy(module.unet)
    torch.nn.Module.to(half, torch.bfloat16)
    whole = merge_adapters(half)
    assert whole.dtype == torch.float32
    assert merge_adapters(whole) is whole


def test_a_call_takes_its_own_settings(exported, pipeline):
    module, _ = exported
    prompt = PROMPTS[0]
    plain = pipeline(prompt, seed=7)
    assert plain.images[0].size == (64, 64)
    default = pipeline(prompt, seed=7, output_type="pt").images
    for change in (
        {"num_inference_steps": 2},
        {"guidance_scale": 1.0},
        {"sampler": "unipc"},
        {"seed": 8},
    ):
        changed = pipeline(prompt, **{"seed": 7, "output_type": "pt", **change}).images
        assert (changed - default).abs().max() > 1e-3
    same = pipeline(prompt, 3, 3.0, seed=7, sampler="ddim", output_type="pt").images
    assert torch.equal(same, default)
    noise = module.generator.noise([0], 7)
    assert torch.equal(pipeline(prompt, latents=noise, output_type="pt").images, default)
    drawn = [
        pipeline(prompt, generator=torch.Generator().manual_seed(3), output_type="pt").images
        for _ in range(2)
    ]
    assert torch.equal(*drawn)
    with pytest.raises(ConfigError, match="expected one of `seed`"):
        pipeline(prompt, seed=1, latents=noise)
    with pytest.raises(ConfigError, match=r"of shape \(1, 4, 8, 8\); got \(1, 4, 4, 4\)"):
        pipeline(prompt, latents=noise[..., :4, :4])


def test_half_precision_is_near_and_its_text_is_encoded_anew(pipeline):
    exact = pipeline(PROMPTS[0], seed=7, output_type="pt").images
    pipeline.to(torch.bfloat16)
    near = pipeline(PROMPTS[0], seed=7, output_type="pt").images
    assert near.dtype == torch.float32
    assert 0 < (near - exact).abs().max() < 0.1
    assert pipeline.encode_prompt(PROMPTS[0]).prompt_embeds.dtype == torch.bfloat16


def test_an_exchanged_text_model_is_used(pipeline):
    before = pipeline.encode_prompt(PROMPTS[0]).prompt_embeds
    assert pipeline.conditioner is pipeline.conditioner  # remembers prompts between calls
    other = copy.deepcopy(pipeline.text_encoder)
    torch.nn.init.normal_(other.get_input_embeddings().weight)
    pipeline.text_encoder = other
    assert (pipeline.encode_prompt(PROMPTS[0]).prompt_embeds - before).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "other"])
def test_noise_levels_survive(kind):
    if kind == "other":
        levels = torch.linspace(0.99, 0.01, 1000, dtype=torch.float64)
        schedule = NoiseSchedule(levels, "v_prediction")
    else:
        schedule = NoiseSchedule.from_config({"beta_schedule": kind, "beta_end": 0.013})
    scheduler = make_scheduler(schedule, "leading")
    config = json.loads(scheduler.to_json_string())
    assert (config["trained_betas"] is None) == (kind != "other")
    found = NoiseSchedule.from_config(config)
    assert torch.allclose(found.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-11)
    assert found.prediction_type == schedule.prediction_type
    assert (config["timestep_spacing"], config["steps_offset"]) == ("leading", 1)


def test_official_spacing_is_one_that_diffusers_knows():
    schedule = NoiseSchedule.from_config({"beta_schedule": "scaled_linear"})
    scheduler = make_scheduler(schedule, "official")
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(range(999, 0, -20))


def test_every_text_setting_survives(tmp_path):
    text = TextEncoding(
        kind="truncated", context="clip+t5", segmenter=WindowSegmenter(30), token_budget=7,
        policy=SpecialTokenPolicy(start="first", end="keep", pad="eos", num_pad_positions=3),
        long_segments="truncate", over_budget="proportional", mask_padding=True,
        cache_megabytes=3, pooled="first", t5=T5Branch(),
    )  # fmt: skip
    places = [field.name for field in dataclasses.fields(text) if field.type == str | None]
    assert "feature_store_2" in places
    text = dataclasses.replace(text, **dict.fromkeys(places, "somewhere"))
    SegmentEncoding.describe(text).save_pretrained(tmp_path)
    found = SegmentEncoding.from_pretrained(tmp_path).encoding()
    assert isinstance(found.segmenter, WindowSegmenter)
    assert found.segmenter.num_tokens == 30
    # What was read from elsewhere lies in the folder itself.
    nowhere = dict.fromkeys(places)
    expected = dataclasses.replace(text, segmenter=found.segmenter, t5=None, **nowhere)
    assert found == expected
    (tmp_path / "config.json").write_text('{"colour": "red"}')
    with pytest.raises(DataError, match="settings of a text encoding; got"):
        SegmentEncoding.from_pretrained(tmp_path).encoding()
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DataError, match=r"expected settings in `.*config\.json`"):
        SegmentEncoding.from_pretrained(tmp_path)


def test_the_card_says_what_it_is(exported):
    _, folder = exported
    text = (folder / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: diffusers\n")
    for part in ("- Base: `` a `base` ``", "- Optimizer steps: 3", "moving average", "## License"):
        assert part in text
    assert 'LongTextPipeline.from_pretrained("FOLDER")' in text


def test_a_folder_is_whole_or_not_there(exported, tmp_path, monkeypatch):
    module, folder = exported
    with pytest.raises(ConfigError, match="has content"):
        save_pipeline_folder(module, folder, CARD)
    monkeypatch.setattr(ModelCard, "pipeline_text", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_pipeline_folder(module, tmp_path / "new", CARD)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_named(exported, tmp_path):
    folder = shutil.copytree(exported[1], tmp_path / "copy")
    check_files(folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DataError, match=r"`unet/diffusion_pytorch_model\.safetensors` differs"):
        check_files(folder)
    weights.unlink()
    with pytest.raises(DataError, match=r"`unet/diffusion_pytorch_model\.safetensors` is missing"):
        check_files(folder)
    shutil.copy(exported[1] / "unet" / weights.name, weights)
    check_files(folder)
    (folder / "unet" / f"{weights.name}.index.json").write_text("{}")  # diffusers reads it first
    with pytest.raises(DataError, match=r"safetensors\.index\.json` was added"):
        check_files(folder)


def test_a_codec_of_another_kind_is_refused(exported, monkeypatch):
    module, _ = exported
    monkeypatch.setattr(module.generator, "codec", object())
    with pytest.raises(ConfigError, match="got `object`"):
        make_pipeline(module)
