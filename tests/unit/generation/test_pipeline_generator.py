"""Pipelines of diffusers as generators: all baselines' kinds, noise by seed and id, safe files."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
import toy_pipelines
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.utils import DummyObject
from transformers import CLIPConfig, CLIPImageProcessor

from segalign.errors import ConfigError, DataError
from segalign.generation import pipeline_loading
from segalign.generation.pipeline_call import CallSettings
from segalign.generation.pipeline_files import find_pipeline
from segalign.generation.pipeline_generator import PipelineGenerator
from segalign.rng import counter_normal

CAPTIONS = ["a red fox on a wall", "two owls", "x " * 130]
SETTINGS = {
    "stable_diffusion": CallSettings(num_inference_steps=2),
    "sdxl": CallSettings(num_inference_steps=2),
    "pixart": CallSettings(
        num_inference_steps=2,
        arguments={"use_resolution_binning": False, "max_sequence_length": 90},
    ),
    "kandinsky": CallSettings(
        num_inference_steps=2, height=16, width=16, arguments={"prior_num_inference_steps": 2}
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A folder of every kind, saved by diffusers; tests leave them as they are."""
    root = tmp_path_factory.mktemp("pipelines")
    for name in SETTINGS:
        getattr(toy_pipelines, name)().save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def opened(folders) -> dict[str, PipelineGenerator]:
    return {n: PipelineGenerator.load(str(folders / n), each) for n, each in SETTINGS.items()}


@pytest.fixture
def copied(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders / "stable_diffusion", tmp_path / "model"))


def edit_index(folder: Path, **changes) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}))


@pytest.mark.parametrize("kind", SETTINGS)
def test_an_image_depends_on_its_caption_seed_and_id_alone(kind, opened):
    generator = opened[kind]
    torch.manual_seed(1)
    images = generator.generate(CAPTIONS, [5, 6, 7], 3)
    assert images.shape == (3, 3, 16, 16)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < 0.3 < 0.7 < images.max() <= 1
    torch.manual_seed(2)
    # Another order, company and form of the seeds. Sums of float32 in other shapes.
    others = generator.generate([CAPTIONS[2], CAPTIONS[0]], [7, 5], [3, 3])
    assert (others - images[[2, 0]]).abs().max() <= 2e-5
    alone = generator.generate(CAPTIONS[1:2], [6], 3)
    assert (alone - images[1:2]).abs().max() <= 2e-5
    for changed in (
        generator.generate(CAPTIONS, [8, 9, 10], 3),
        generator.generate(CAPTIONS, [5, 6, 7], 4),
        generator.generate(["a blue box"] * 3, [5, 6, 7], 3),
    ):
        assert ((changed - images).abs().amax(dim=(1, 2, 3)) > 1e-3).all()


def test_images_are_those_of_the_pipeline_in_the_range_of_its_own_pictures(opened):
    generator = opened["kandinsky"]
    seeds = [torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)]
    images = generator.generate(CAPTIONS[:1], [0], 0)
    # Its "pt" would be in [-1, 1].
    raw = generator.pipeline(
        CAPTIONS[0], generator=seeds[:1], output_type="pt", **generator._call(1)
    )
    assert raw.images.min() < -0.2
    assert images.min() >= 0


def test_a_pipeline_starts_from_the_noise_of_runs(opened, monkeypatch):
    seen = []
    pipeline = opened["stable_diffusion"].pipeline
    own = pipeline.prepare_latents
    monkeypatch.setattr(
        pipeline, "prepare_latents", lambda *a, **k: seen.append(own(*a, **k)) or seen[-1]
    )
    opened["stable_diffusion"].generate(CAPTIONS[:2], [5, 6], [3, 4])
    assert torch.equal(seen[0], counter_normal("generate", [(3, 5), (4, 6)], (4, 8, 8)))


def test_a_pipeline_holds_one_set_of_weights(opened):
    with pytest.raises(ConfigError, match="expected `weights: raw`"):
        opened["sdxl"].generate(CAPTIONS, [0, 1, 2], 0, "ema")


# Settings


def load(folder, **settings) -> PipelineGenerator:
    arguments = settings.pop("arguments", {})
    return PipelineGenerator.load(str(folder), CallSettings(**settings, arguments=arguments))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arguments": {"clip_skp": 1}}, "`StableDiffusionPipeline` takes; got `clip_skp`"),
        ({"arguments": {"guidance_scale": 2.0}}, "expected no `guidance_scale` in `arguments`"),
        ({"arguments": {"generator": 1}}, "expected no `generator` in `arguments`"),
        ({"arguments": {"eta": object()}}, "got `eta`: object"),
    ],
)  # fmt: skip
def test_arguments_that_are_not_taken_are_refused(opened, settings, message):
    generator = opened["stable_diffusion"]
    with pytest.raises(ConfigError, match=message) as raised:
        PipelineGenerator(generator.pipeline, CallSettings(**settings), generator.files)
    assert "\n" not in str(raised.value)


def test_arguments_that_vanish_in_kwargs_are_refused(opened):
    generator = opened["pixart"]
    with pytest.raises(ConfigError, match="`PixArtAlphaPipeline` takes; got `mask_feature`"):
        PipelineGenerator(
            generator.pipeline, CallSettings(arguments={"mask_feature": True}), generator.files
        )


def test_settings_change_images_and_are_described(folders):
    folder = folders / "stable_diffusion"
    plain = load(folder, num_inference_steps=2)
    changes = [
        {"guidance_scale": 2.0},
        {"num_inference_steps": 3},
        {"negative_prompt": "owls"},
        {"arguments": {"guidance_rescale": 0.5}},
    ]
    images = plain.generate(CAPTIONS[:2], [0, 1], 0)
    for change in changes:
        settings = {"num_inference_steps": 2, **change}
        plain = PipelineGenerator(
            plain.pipeline, CallSettings(**{"arguments": {}, **settings}), plain.files
        )
        assert (plain.generate(CAPTIONS[:2], [0, 1], 0) - images).abs().max() > 1e-5, change
    wide = PipelineGenerator(plain.pipeline, CallSettings(height=16, width=32), plain.files)
    assert wide.generate(CAPTIONS[:1], [0], 0).shape == (1, 3, 16, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 32}, "expected both `height` and `width`, or neither; got 32 and None"),
        ({"width": 32}, "expected both `height` and `width`, or neither; got None and 32"),
        ({"negative_prompt": "x", "guidance_scale": 1.0}, "a `guidance_scale` at which .* got 1.0"),
        ({"arguments": {"eta": 0.5}}, "expected no `eta` in .* scheduler `PNDMScheduler` does not"),
    ],
)
def test_settings_that_would_be_passed_over_are_refused(opened, settings, message):
    generator = opened["stable_diffusion"]
    with pytest.raises(ConfigError, match=message) as raised:
        PipelineGenerator(generator.pipeline, CallSettings(**settings), generator.files)
    assert "\n" not in str(raised.value)


def test_a_default_that_the_scheduler_does_not_take_is_not_described(opened, folders):
    assert "eta" not in opened["stable_diffusion"].description()["arguments"]
    settings = CallSettings(arguments={"eta": 0.5})
    ddim = PipelineGenerator.load(str(folders / "stable_diffusion"), settings, sampler="ddim")
    assert ddim.description()["arguments"]["eta"] == 0.5


class OtherGuidance(StableDiffusionPipeline):
    """Guided at every scale above zero, as some newer pipelines are."""

    @property
    def do_classifier_free_guidance(self):
        return self._guidance_scale > 0


class TwoScales(StableDiffusionPipeline):
    """The network is told of one scale, and the other guides, as in Flux."""

    def __call__(
        self, prompt=None, negative_prompt=None, guidance_scale=3.5, true_cfg_scale=1.0,
        generator=None, output_type=None,
    ):  # fmt: skip
        raise NotImplementedError


def test_a_pipeline_says_whether_it_looks_at_a_negative_prompt(opened):
    generator = opened["stable_diffusion"]
    parts = {**generator.pipeline.components, "requires_safety_checker": False}
    low = CallSettings(negative_prompt="x", guidance_scale=0.5)
    made = PipelineGenerator(OtherGuidance(**parts), low, generator.files)
    assert made.arguments["guidance_scale"] == 0.5
    two = TwoScales(**parts)
    with pytest.raises(ConfigError, match=r"a `true_cfg_scale` at which `TwoScales` .* got 1\.0"):
        PipelineGenerator(two, CallSettings(negative_prompt="x"), generator.files)
    guided = CallSettings(negative_prompt="x", arguments={"true_cfg_scale": 2.0})
    assert PipelineGenerator(two, guided, generator.files).arguments["true_cfg_scale"] == 2.0


def test_images_of_another_size_are_refused(opened):
    generator = opened["kandinsky"]
    arguments = {"prior_num_inference_steps": 2}
    settings = CallSettings(num_inference_steps=2, height=17, width=16, arguments=arguments)
    odd = PipelineGenerator(generator.pipeline, settings, generator.files)
    with pytest.raises(ConfigError, match=r"images of 17 x 16 pixels of .* it makes [0-9]+ x 16"):
        odd.generate(CAPTIONS[:1], [0], 0)


class DrawingScheduler(DDIMScheduler):
    """Draws noise and asks no generator, as ``DPMSolverSDEScheduler`` does."""

    def step(self, model_output, timestep, sample, return_dict=True):
        stepped = super().step(model_output, timestep, sample, return_dict=return_dict)
        return (stepped[0] + 0.5 * torch.randn_like(stepped[0]), *stepped[1:])


def test_noise_that_a_scheduler_draws_by_itself_repeats(folders):
    generator = load(folders / "stable_diffusion", num_inference_steps=2)
    scheduler = DrawingScheduler.from_config(generator.pipeline.scheduler.config)
    generator.pipeline.scheduler = scheduler
    torch.manual_seed(1)
    images = generator.generate(CAPTIONS[:2], [5, 6], 3)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(2)
    assert torch.equal(generator.generate(CAPTIONS[:2], [5, 6], [3, 3]), images)
    for ids, eval_seed in (([5, 7], 3), ([5, 6], [3, 4])):
        # The first row has the same noise of its own: only what the scheduler drew differs.
        changed = generator.generate(CAPTIONS[:2], ids, eval_seed)[0]
        assert (changed - images[0]).abs().max() > 1e-3


def test_another_scheduler_keeps_the_noise_levels(folders):
    folder = folders / "stable_diffusion"
    changed = PipelineGenerator.load(str(folder), CallSettings(), sampler="ddim")
    scheduler = changed.pipeline.scheduler
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.config.beta_end == 0.012
    assert changed.description()["sampler"]["name"] == "DDIMScheduler"


def test_both_stages_get_the_scheduler(folders):
    changed = PipelineGenerator.load(str(folders / "kandinsky"), CallSettings(), sampler="ddim")
    assert isinstance(changed.pipeline.decoder_pipe.scheduler, DDIMScheduler)
    with pytest.raises(ConfigError, match="expected no `negative_prompt`"):
        PipelineGenerator(changed.pipeline, CallSettings(negative_prompt="x"), changed.files)


def test_a_pipeline_that_needs_images_is_refused(opened):
    decoder = opened["kandinsky"].pipeline.decoder_pipe
    with pytest.raises(ConfigError, match="`KandinskyV22Pipeline` needs `image_embeds`"):
        PipelineGenerator(decoder, CallSettings(), opened["kandinsky"].files)


def test_lower_precision_rounds_all_weights(folders):
    low = PipelineGenerator.load(
        str(folders / "stable_diffusion"), CallSettings(num_inference_steps=2), dtype=torch.bfloat16
    )
    assert low.description()["dtype"] == "bfloat16"
    assert low.generate(CAPTIONS[:1], [0], 0).dtype == torch.float32


# What a reader must know


def test_cut_captions_are_counted_and_told_once(opened, caplog):
    generator = PipelineGenerator(
        opened["sdxl"].pipeline, SETTINGS["sdxl"], opened["sdxl"].files
    )  # fmt: skip
    generator.generate(CAPTIONS[:2], [0, 1], 0)
    assert caplog.messages == []
    generator.generate(CAPTIONS, [0, 1, 2], 0)
    generator.generate(CAPTIONS, [0, 1, 2], 1)
    (message,) = caplog.messages
    assert message == (
        "captions are cut by `sdxl`: 1 of 3 at the 77 tokens of `tokenizer`; 1 of 3 at the 77 "
        "tokens of `tokenizer_2`"
    )


def test_the_context_is_that_of_the_encoder_or_of_the_call(opened):
    # 75 words and 2 special tokens fit CLIP; T5 adds one, and the call says 90.
    fits, cut = "a " * 75, "a " * 76
    counts = opened["kandinsky"].caption_cuts([fits, cut])
    assert counts == {"prior_tokenizer": {"context": 77, "num_cut": 1, "num_captions": 2}}
    counts = opened["pixart"].caption_cuts(["x " * 44, "x " * 90])
    assert counts == {"tokenizer": {"context": 90, "num_cut": 1, "num_captions": 2}}


def test_a_description_says_what_makes_the_images(opened):
    found = opened["kandinsky"].description()
    assert json.loads(json.dumps(found)) == found
    assert found["name"] == "kandinsky"
    assert found["classes"]["pipeline"] == "KandinskyV22CombinedPipeline"
    assert found["classes"]["prior_prior"] == "PriorTransformer"
    # Defaults are told too: the next version of the library may have others.
    assert found["sampler"] == {
        "name": "DDPMScheduler", "num_inference_steps": 2, "guidance_scale": 4.0,
    }  # fmt: skip
    assert found["arguments"]["prior_guidance_scale"] == 4.0
    assert opened["pixart"].description()["arguments"]["clean_caption"] in (True, False)


def test_the_digest_is_of_what_is_loaded(copied, folders):
    digest = find_pipeline(str(folders / "stable_diffusion")).digest()
    assert find_pipeline(str(copied)).digest() == digest
    (copied / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a further copy")
    (copied / "README.md").write_text("words")
    assert find_pipeline(str(copied)).digest() == digest
    weights = copied / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert find_pipeline(str(copied)).digest() != digest


# Files


def test_pickled_weights_are_refused(copied):
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ConfigError, match=r"model's `unet` as config and safetensors at"):
        load(copied)


def test_pickled_text_weights_are_refused(copied):
    weights = copied / "text_encoder" / "model.safetensors"
    torch.save({}, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(ConfigError, match=r"model's `text_encoder` as config and safetensors at"):
        load(copied)


def test_weights_that_the_library_would_draw_are_refused(copied):
    config = copied / "unet" / "config.json"
    settings = json.loads(config.read_text()) | {"layers_per_block": 2}
    config.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="no weight of the right shape for"):
        load(copied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": ["pipeline", "Mine"]}, r"names `\['pipeline', 'Mine'\]`; code"),
        ({"_class_name": "Mine"}, "names `Mine`; code that comes with a model is never run"),
        ({"_class_name": "UNet2DConditionModel"}, "expected a pipeline of diffusers"),
        ({"unet": ["side_effect", "Net"]}, "its `unet` is `side_effect.Net`"),
        ({"unet": ["os", "system"]}, "its `unet` is `os.system`"),
        ({"unet": ["diffusers", "logging"]}, "its `unet` is `diffusers.logging`"),
    ],
)
def test_code_of_a_model_is_never_run(copied, changes, message):
    effect = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()"
    for place in (copied / "pipeline.py", copied / "unet" / "side_effect.py"):
        place.write_text(effect)
    edit_index(copied, **changes)
    with pytest.raises(ConfigError, match=message):
        load(copied)
    assert list(copied.rglob("ran")) == []
    assert "side_effect" not in sys.modules


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("text_encoder", ["transformers", "AutoModel"]),
        ("text_encoder", ["diffusers", "AutoModel"]),
        ("text_encoder", ["transformers", "TimmBackbone"]),  # reads weights in its own way
        ("tokenizer", ["transformers", "AutoTokenizer"]),
        ("unet", ["diffusers", "OnnxRuntimeModel"]),
        ("unet", ["transformers", "Trainer"]),
        ("image_encoder", ["diffusers", "DiffusionPipeline"]),
        ("image_encoder", ["diffusers", "StableDiffusionPipeline"]),
        ("text_encoder", [{"a": 1}, "x"]),
        ("text_encoder", ["transformers", ["x"]]),
    ],
)
def test_parts_of_other_kinds_are_refused_before_they_are_read(copied, part, entry):
    shutil.rmtree(copied / part, ignore_errors=True)
    edit_index(copied, **{part: entry})
    with pytest.raises(DataError, match=f"`{part}`") as raised:
        load(copied)
    assert "\n" not in str(raised.value)


def test_a_part_that_needs_missing_packages_names_them(copied, monkeypatch):
    kind = DummyObject("NeedyScheduler", (), {"_backends": ["torch", "torchsde"]})
    kind.__module__ = "diffusers.utils"
    monkeypatch.setattr("diffusers.NeedyScheduler", kind, raising=False)
    edit_index(copied, scheduler=["diffusers", "NeedyScheduler"])
    with pytest.raises(ConfigError, match="the packages `torch`, `torchsde`, which the part"):
        load(copied)


def test_adapters_beside_weights_are_refused(copied):
    (copied / "text_encoder" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"`text_encoder` at .* without an adapter"):
        load(copied)


def test_a_prior_that_is_not_there_is_no_hub_id(folders, stages):
    with pytest.raises(ConfigError, match=r"`models/prior`; there is no such folder") as raised:
        find_pipeline(str(stages / "decoder"), "models/prior")
    assert "\n" not in str(raised.value)


def test_a_missing_part_is_named(copied):
    shutil.rmtree(copied / "vae")
    with pytest.raises(ConfigError, match=r"the text-to-image model with a folder `vae/`"):
        load(copied)
    edit_index(copied, vae=None)
    with pytest.raises(ConfigError, match="with a part `vae`"):
        load(copied)


def test_a_tokenizer_without_words_is_refused(copied, monkeypatch):
    (copied / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"model's `tokenizer` at .* with a vocabulary"):
        load(copied)
    # As PixArt's comes.
    (copied / "tokenizer" / "spiece.model").touch()
    monkeypatch.setattr(pipeline_loading, "is_sentencepiece_available", lambda: False)
    with pytest.raises(ConfigError, match="packages `sentencepiece` and `protobuf`"):
        load(copied)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_an_index_that_cannot_be_read_is_one_line(copied, content):
    (copied / "model_index.json").unlink()
    if content is not None:
        (copied / "model_index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"`model_index\.json`|pipeline of diffusers") as raised:
        load(copied)
    assert "\n" not in str(raised.value)


def test_a_hub_id_that_is_not_cached_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"`owner/name` in the hub's cache or online; got"):
        find_pipeline("owner/name")


def test_no_safety_checker_blanks_images(tmp_path, caplog):
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    vision = {**text, "image_size": 28, "patch_size": 14}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    pipeline = toy_pipelines.stable_diffusion(
        safety_checker=StableDiffusionSafetyChecker(config), feature_extractor=CLIPImageProcessor()
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path)
    # It is not even read: its weights may be pickles.
    (tmp_path / "safety_checker" / "model.safetensors").unlink()
    loaded = load(tmp_path)
    assert isinstance(loaded.pipeline, StableDiffusionPipeline)
    assert loaded.pipeline.safety_checker is None
    assert loaded.description()["safety_checker"] is False
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.fixture
def stages(folders, tmp_path) -> Path:
    """Kandinsky as on the hub: a decoder, and the prior that its card names."""
    whole = folders / "kandinsky"
    for stage, prefix in (("decoder", ""), ("prior", "prior_")):
        for name in ("unet", "movq", "scheduler") if not prefix else (
            "prior", "image_encoder", "text_encoder", "tokenizer", "image_processor", "scheduler",
        ):  # fmt: skip
            shutil.copytree(whole / f"{prefix}{name}", tmp_path / stage / name)
    index = json.loads((whole / "model_index.json").read_text())
    own = {name: index[name] for name in ("unet", "movq", "scheduler")}
    first = {n.removeprefix("prior_"): e for n, e in index.items() if n.startswith("prior_")}
    for stage, parts, kind in (
        ("decoder", own, "KandinskyV22Pipeline"),
        ("prior", first, "KandinskyV22PriorPipeline"),
    ):
        content = json.dumps({"_class_name": kind, **parts})
        (tmp_path / stage / "model_index.json").write_text(content)
    return tmp_path


def test_a_decoder_takes_the_prior_it_is_given_or_names(stages, opened):
    whole = opened["kandinsky"].generate(CAPTIONS, [0, 1, 2], 0)
    settings = SETTINGS["kandinsky"]
    with pytest.raises(ConfigError, match="Set `prior` to the folder or hub id of the first"):
        PipelineGenerator.load(str(stages / "decoder"), settings)
    prior = str(stages / "prior")
    given = PipelineGenerator.load(str(stages / "decoder"), settings, prior=prior)
    assert torch.equal(given.generate(CAPTIONS, [0, 1, 2], 0), whole)
    (stages / "decoder" / "README.md").write_text(f"---\nprior:\n- {prior}\n---\nwords\n")
    named = find_pipeline(str(stages / "decoder"))
    assert named.digest() == given.digest
    (stages / "prior" / "scheduler" / "scheduler_config.json").write_text("{}")
    assert named.digest() != given.digest


def test_a_prior_for_one_stage_is_refused(folders):
    with pytest.raises(ConfigError, match="expected no `prior`"):
        find_pipeline(str(folders / "sdxl"), str(folders / "kandinsky"))


def test_a_model_of_the_hubs_cache_is_known_by_its_commit(folders, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--tiny"
    shutil.copytree(folders / "stable_diffusion", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = find_pipeline("owner/tiny")
    assert (found.name, found.revision) == ("owner/tiny", commit)
    assert found.digest() == find_pipeline(str(folders / "stable_diffusion")).digest()
