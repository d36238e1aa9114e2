"""``main.py export``: a run's weights in the formats of others."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from segalign.commands.parsing import add_run_options, parse_options
from segalign.errors import ConfigError

if TYPE_CHECKING:
    from segalign.diffusion.model_card import ModelCard
    from segalign.generation.opening import RunLoader
    from segalign.rewards.scorer_card import ScorerCard
    from segalign.text.settings import TextEncoding

_FORMATS = ("diffusers", "lora", "official-lora", "clip")


def run(argv: Sequence[str], load_run: "RunLoader") -> int:
    """Run one command line and return its exit code.

    Args:
        argv: Arguments after the command.
        load_run: Builds the module of a run.

    Raises:
        SegalignError: If the arguments do not fit, or the run does not have what is asked for.
    """
    options = parse_options(build_parser(), argv)
    from segalign.formats.folders import check_new

    check_new(Path(options.out))
    _export(options, load_run)
    print(f"wrote {options.format} to {options.out}")
    return 0


def build_parser() -> ArgumentParser:
    """Build the parser of the command's arguments."""
    parser = ArgumentParser(
        prog="main.py export",
        description="Write the weights of a run for other programs.",
        exit_on_error=False,
    )
    add = parser.add_argument
    add("--checkpoint", type=str, required=True, help="run, checkpoint, or RUN/checkpoints/best")
    add(
        "--format",
        choices=_FORMATS,
        required=True,
        help="diffusers: folder that loads as a pipeline, LoRA merged; lora: what "
        "pipe.load_lora_weights takes; official-lora: the list file of LongSD; clip: folder of a "
        "preference model, which rewards and transformers load",
    )
    add("--out", type=str, required=True, help="new folder")
    add_run_options(parser)
    return parser


def _export(options: Namespace, load_run: "RunLoader") -> None:
    from segalign.devices import choose_device
    from segalign.diffusion.pipeline_folder import save_pipeline_folder
    from segalign.generation.opening import choose_weights
    from segalign.rewards.scorer_folder import save_scorer_folder
    from segalign.run_directory import resolve_checkpoint

    path = Path(options.checkpoint)
    checkpoint = resolve_checkpoint(path, option="--checkpoint", allows_auto=False)
    module: Any = load_run(
        checkpoint, device=choose_device("cpu"), allow_import=options.allow_import
    )
    _check_kind(module, options)
    weights = choose_weights(module, options.weights)
    with module.weights(weights):
        if options.format == "clip":
            save_scorer_folder(
                module.scorer,
                Path(options.out),
                card=_scorer_card(module, checkpoint, weights),
                max_logit_scale=module.max_logit_scale,
            )
        elif options.format == "diffusers":
            save_pipeline_folder(module, Path(options.out), _card(module, checkpoint, weights))
        else:
            _export_lora(module, options, _card(module, checkpoint, weights))


def _check_kind(module: Any, options: Namespace) -> None:
    """Refuse a run of another kind of model than the format is for.

    Raises:
        ConfigError: If it is one.
    """
    from segalign.diffusion.generator import TextToImage
    from segalign.rewards.segment_scorer import SegmentScorer

    kind: type = TextToImage
    what, name = "text-to-image", "generator"
    if options.format == "clip":
        what, name, kind = "preference", "scorer", SegmentScorer
    if not isinstance(getattr(module, name, None), kind):
        raise ConfigError(
            f"expected a run of a {what} model in `{options.checkpoint}` for `--format "
            f"{options.format}`; got `{type(module).__name__}`. Name another run or format."
        )


def _export_lora(module: Any, options: Namespace, card: "ModelCard") -> None:
    """Write the low-rank adapters, and beside them a text adapter that was trained with them."""
    from segalign.diffusion.pipeline_folder import has_adapters
    from segalign.formats.folders import new_folder
    from segalign.formats.official_lora import write_official_lora
    from segalign.formats.peft_lora import lora_pairs, save_diffusers_lora
    from segalign.text.adapter import save_adapter

    unet = module.generator.unet
    if not has_adapters(unet):
        raise ConfigError(
            f"expected a run that trained LoRA for `--format {options.format}`; it trained the "
            "whole network. Use `--format diffusers`."
        )
    _check_nothing_lost(module, options.format)
    pairs = lora_pairs(unet)
    t5 = module.text_models.t5
    with new_folder(Path(options.out)) as folder:
        if options.format == "lora":
            save_diffusers_lora(pairs, folder)
            how = "`pipe.load_lora_weights(FOLDER)` adds it to a pipeline of the base."
        else:
            write_official_lora(pairs, unet, folder / "lora_vis.pt")
            how = "`lora_vis.pt` is the list of tensors that the official LongSD code reads."
        if t5 is not None and t5.adapter is not None:
            save_adapter(t5.adapter, folder / "adapter")
            how += " `adapter/` maps the features of T5, in the layout of LaVi-Bridge."
        (folder / "README.md").write_text(
            card.lora_text(f"{how}{_base_of_lora(module.base)}"), encoding="utf-8"
        )


def _check_nothing_lost(module: Any, kind: str) -> None:
    """Refuse a run that trained more than LoRA and a text adapter.

    Raises:
        ConfigError: If it did.
    """
    from segalign.trainable import trainable_parameters

    unet, t5 = module.generator.unet, module.text_models.t5
    written = {id(weight) for name, weight in unet.named_parameters() if ".lora_" in name}
    if t5 is not None and t5.adapter is not None:
        written |= {id(weight) for weight in t5.adapter.parameters()}
    trained = trainable_parameters(module)
    lost = [name for name, weight in trained.items() if id(weight) not in written]
    if lost:
        raise ConfigError(
            f"expected a run that trained nothing but LoRA and a T5 adapter for `--format {kind}`; "
            f"it trained {len(lost)} other tensors, such as `{lost[0]}`. Use `--format diffusers`."
        )


def _base_of_lora(base: object) -> str:
    """Say what an exported LoRA belongs on, if that is not the plain base."""
    loras: Sequence[str] = getattr(base, "loras", ())
    if not loras:
        return ""
    names = ", ".join(f"`{name}`" for name in loras)
    return (
        f"\n\nIt was trained over the base with these LoRAs merged: {names}. Merge them first, in "
        "this order: over the plain base it is another model."
    )


def _card(module: Any, checkpoint: Path, weights: str) -> "ModelCard":
    """Collect what is known of a run."""
    from segalign.diffusion.model_card import ModelCard
    from segalign.run_directory import META_FILE, file_digest, stored_step
    from segalign.trainable import trainable_parameters

    weights_of = trainable_parameters(module)
    return ModelCard(
        base=repr(module.base),
        trained=_trained_parts({name: p.numel() for name, p in weights_of.items()}),
        checkpoint=file_digest(checkpoint / META_FILE),
        step=stored_step(checkpoint),
        weights=weights,
        settings={**_text_facts(module.text), "Sampler": repr(module.sampler)},
    )


def _scorer_card(module: Any, checkpoint: Path, weights: str) -> "ScorerCard":
    """Collect what is known of a run that trained a scorer."""
    from segalign.rewards.scorer_card import ScorerCard
    from segalign.run_directory import META_FILE, file_digest, stored_step

    return ScorerCard(
        source=repr(module.scorer_source),
        trained=repr(module.trained),
        losses=module.objective.weights(),
        checkpoint=file_digest(checkpoint / META_FILE),
        step=stored_step(checkpoint),
        weights=weights,
        segmenter=module.scorer.segmenter,
    )


def _trained_parts(counts: Mapping[str, int]) -> str:
    """Sum trained parameters by part, given their numbers by name."""
    sums: dict[str, int] = {}
    for name, count in counts.items():
        part = "LoRA" if ".lora_" in name else "T5 adapter" if ".adapter." in name else "networks"
        sums[part] = sums.get(part, 0) + count
    return ", ".join(f"{part} ({count:,} parameters)" for part, count in sums.items())


def _text_facts(text: "TextEncoding") -> dict[str, str]:
    """Describe in words how captions are encoded."""
    from segalign.text.segmenter import SentenceSegmenter
    from segalign.text.segmenters import describe_segmenter

    facts: dict[str, str] = {"Context": text.context}
    if text.context != "t5" and text.kind == "segments":
        segmenter = describe_segmenter(text.segmenter or SentenceSegmenter())
        policy = text.policy
        facts["CLIP reads"] = f"segments ({segmenter['name']}), {text.token_budget} tokens in all"
        facts["Special tokens"] = f"start {policy.start}, end {policy.end}, padding {policy.pad}"
    elif text.context != "t5":
        facts["CLIP reads"] = "the caption, cut at its context"
    if text.context != "clip" and text.t5 is not None:
        facts["T5"] = f"{text.t5.model}, {text.t5.token_budget} tokens, with its adapter"
    return facts
