"""``main.py import``: weights of others, checked and rewritten in open formats."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from segalign.commands.parsing import parse_arguments

_OUT = "new folder to write; one with content is never touched"


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    Raises:
        SegalignError: If the arguments do not fit, or the weights are not what they should be.
    """
    options = parse_arguments(build_parser(), argv, list(_COMMANDS))
    command = options.command
    arguments = options[command]
    _check_out(arguments)
    _show(_COMMANDS[command](arguments))
    return 0


def build_parser() -> ArgumentParser:
    """Build the parser of the command's arguments."""
    parser = ArgumentParser(
        prog="main.py import",
        description="check weights of others and rewrite them; files with code in them are refused",
        exit_on_error=False,
    )
    commands = parser.add_subcommands(dest="command", metavar=" | ".join(_COMMANDS))
    commands.add_subcommand("lora", _lora_parser(), help="official LoRA list (`lora_vis.pt`)")
    commands.add_subcommand("adapter", _adapter_parser(), help="T5 adapter (LaVi-Bridge, LongSD)")
    commands.add_subcommand("denscore", _scorer_parser(), help="Denscore or another CLIP scorer")
    commands.add_subcommand("longsd", _long_sd_parser(), help="LongSD, whole, as a pipeline")
    return parser


def _lora_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="write DIR/pytorch_lora_weights.safetensors for pipe.load_lora_weights(DIR)"
    )
    parser.add_argument("file", type=str, help="the list file; its rank is found out")
    parser.add_argument(
        "--base",
        type=str,
        default="sd15",
        help="model that the LoRA was trained on, which names the layers: `sd15` (built in, "
        "needs no weights), or a folder or hub id in diffusers layout",
    )
    parser.add_argument("--out", type=str, required=True, help=_OUT)
    return parser


def _adapter_parser() -> ArgumentParser:
    parser = ArgumentParser(description="write the adapter as config and safetensors")
    parser.add_argument("folder", type=str, help="adapter folder with `config.json` and weights")
    parser.add_argument("--out", type=str, required=True, help=_OUT)
    return parser


def _scorer_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="write the scorer as a CLIPModel folder with tokenizer and image settings"
    )
    parser.add_argument(
        "source", type=str, help="folder or hub id of a CLIPModel, as `luping-liu/Denscore`"
    )
    parser.add_argument("--out", type=str, required=True, help=_OUT)
    return parser


def _long_sd_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="merge LongSD's LoRAs into their base in float32, and write the whole model as "
        "one folder for `main.py generate --checkpoint DIR` and LongTextPipeline"
    )
    parser.add_argument(
        "--base",
        type=str,
        default="stable-diffusion-v1-5/stable-diffusion-v1-5",
        help="folder or hub id in diffusers layout",
    )
    parser.add_argument(
        "--t5", type=str, default="google-t5/t5-large", help="T5 model, folder or hub id"
    )
    parser.add_argument(
        "--adapter", type=str, required=True, help="adapter, folder (`s28750_adapter`) or hub id"
    )
    parser.add_argument(
        "--lora",
        type=str,
        action="append",
        required=True,
        help="LoRA list file; give the option once for each stage, in order",
    )
    parser.add_argument("--out", type=str, required=True, help=_OUT)
    return parser


def _check_out(options: Namespace) -> None:
    """Find out before the long part whether there is a place for the result."""
    from segalign.formats.folders import check_new

    check_new(Path(options.out))


def _lora(options: Namespace) -> Mapping[str, str]:
    from segalign.formats.base_unet import unet_structure
    from segalign.formats.lora_pairs import lora_rank
    from segalign.formats.official_lora import match_official_lora, read_official_lora
    from segalign.formats.peft_lora import save_diffusers_lora

    tensors = read_official_lora(Path(options.file))
    pairs = match_official_lora(tensors, unet_structure(options.base))
    file = save_diffusers_lora(pairs, Path(options.out))
    return {
        "read": options.file,
        "base": options.base,
        "layers": f"{len(pairs):,}",
        "rank": f"{lora_rank(pairs)}",
        "parameters": f"{sum(tensor.numel() for tensor in tensors):,}",
        "wrote": _file(file),
    }


def _adapter(options: Namespace) -> Mapping[str, str]:
    from segalign.text.adapter import load_adapter, save_adapter

    adapter = load_adapter(Path(options.folder))
    save_adapter(adapter, Path(options.out))
    return {
        "read": options.folder,
        "widths": f"{adapter.in_dim} to {adapter.int_dim} to {adapter.out_dim}",
        "parameters": f"{sum(part.numel() for part in adapter.parameters()):,}",
        **_written(Path(options.out)),
    }


def _denscore(options: Namespace) -> Mapping[str, str]:
    from segalign.formats.clip_scorer import load_clip_scorer, save_clip_scorer

    scorer = load_clip_scorer(options.source)
    save_clip_scorer(scorer, Path(options.out))
    side = scorer.image_settings.image_size
    return {
        "read": options.source,
        "parameters": f"{sum(part.numel() for part in scorer.model.parameters()):,}",
        "features": f"{scorer.model.projection_dim} wide",
        "images": f"{side} x {side} pixels",
        **_written(Path(options.out)),
    }


def _long_sd(options: Namespace) -> Mapping[str, str]:
    from segalign.formats.long_sd import load_long_sd, write_pipeline

    model = load_long_sd(options.base, t5=options.t5, adapter=options.adapter, loras=options.lora)
    folder = Path(options.out)
    write_pipeline(model, folder, base=options.base, loras=options.lora)
    return {
        "base": options.base,
        "T5": options.t5,
        "adapter": options.adapter,
        **{f"LoRA {stage}": path for stage, path in enumerate(options.lora, 1)},
        "images": f"{model.generator.image_size} x {model.generator.image_size} pixels",
        **_written(folder),
    }


_COMMANDS: Mapping[str, Callable[[Namespace], Mapping[str, str]]] = {
    "lora": _lora,
    "adapter": _adapter,
    "denscore": _denscore,
    "longsd": _long_sd,
}


def _written(folder: Path) -> Mapping[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in files}
    return {"wrote": f"{folder}", **{f"  {names[path]}": _size(path) for path in files}}


def _file(path: Path) -> str:
    return f"{path} ({_size(path)})"


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:,.2f} MiB"


def _show(rows: Mapping[str, str]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
