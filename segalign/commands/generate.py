"""``main.py generate``: images of prompts, from a run, a checkpoint or an exported folder."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from segalign.commands.parsing import add_run_options, parse_options
from segalign.errors import ConfigError, DataError, NonFiniteError
from segalign.generation.prompts import SEEDS, BadLine, Prompt, number_texts, read_prompts

if TYPE_CHECKING:
    from segalign.generation.image_folder import ImageFolder, ImageJob
    from segalign.generation.opening import OpenedModel, RunLoader

DTYPES = ["float32", "bfloat16", "float16"]
_DTYPE_HELP = "precision to compute in; default: that of the weights, which float32 widens"


def run(argv: Sequence[str], load_run: "RunLoader") -> int:
    """Run one command line and return its exit code: 65 if the prompts file has bad lines.

    Args:
        argv: Arguments after the command.
        load_run: Builds the module of a run.

    Raises:
        SegalignError: If the arguments do not fit or something cannot be read or written.
    """
    options = parse_options(build_parser(), argv)
    prompts, bad = _prompts(options)
    for line in bad:
        place = f"{options.prompt_file}:{line.number}"
        print(f"skipping {place}: {line.reason}", file=sys.stderr)
    if prompts:
        _generate(options, prompts, load_run)
    if not bad:
        return 0
    first = bad[0]
    raise DataError(
        f"expected a prompt on every line of `{options.prompt_file}`; {len(bad)} of "
        f"{len(bad) + len(prompts)} lines hold none, the first being line {first.number}; the "
        "images of the others are made. Mend the lines and run the command again."
    )


def build_parser() -> ArgumentParser:
    """Build the parser of the command's arguments."""
    parser = ArgumentParser(
        prog="main.py generate",
        description="Make images of prompts; a killed command goes on where it stopped.",
        exit_on_error=False,
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        type=str,
        required=True,
        help="run, checkpoint, RUN/checkpoints/best, or folder of `main.py export --format "
        "diffusers`",
    )
    add(
        "--prompt", type=str, action="append", default=[], help="a prompt; give several if you like"
    )
    add(
        "--prompt-file",
        type=str | None,
        help="text with a prompt on each line, or .jsonl with `prompt` or `caption`, and "
        "optionally `id` and `seed`",
    )
    add("--out", type=str, required=True, help="folder for the images and their index.html")
    add("--seeds", type=NonNegativeInt, nargs="+", help="an image of each prompt for every seed")
    add("--num-images", type=PositiveInt | None, help="the same as --seeds 0 1 ... N-1")
    add("--sampler", choices=["ddim", "unipc", "dpmpp"], help="default: that of the run")
    add("--steps", type=PositiveInt | None, help="inference steps; default: those of the run")
    add(
        "--guidance",
        type=NonNegativeFloat | None,
        help="factor of classifier-free guidance, 1 is off; default: that of the run",
    )
    add("--batch-size", type=PositiveInt, default=4, help="images made at a time")
    add("--device", type=str | None, help="such as cpu or cuda:1; default: a GPU if there is one")
    add("--dtype", choices=DTYPES, help=_DTYPE_HELP)
    add("--overwrite", action="store_true", help="delete the images of earlier commands first")
    add_run_options(parser)
    return parser


def _prompts(options: Namespace) -> tuple[list[Prompt], list[BadLine]]:
    """Read the prompts, and check what belongs to them."""
    if bool(options.prompt) == (options.prompt_file is not None):
        raise ConfigError(
            "expected prompts either by `--prompt` or by `--prompt-file`; got "
            f"{'both' if options.prompt else 'none'}. Give one of them."
        )
    if options.seeds and options.num_images:
        raise ConfigError("expected `--seeds` or `--num-images`; got both. Give one of them.")
    too_large = next((seed for seed in options.seeds or () if seed >= SEEDS.stop), None)
    if too_large is not None:
        raise ConfigError(f"expected `--seeds` in [0, 2^63); got {too_large}. Take smaller ones.")
    if options.prompt:
        return number_texts(options.prompt), []
    prompts, bad = read_prompts(Path(options.prompt_file))
    if not prompts and not bad:
        raise ConfigError(f"expected prompts in `{options.prompt_file}`; got none. Write some.")
    return prompts, bad


def _generate(options: Namespace, prompts: Sequence[Prompt], load_run: "RunLoader") -> None:
    from segalign.generation import opening
    from segalign.generation.own_files import lock_folder

    opened = opening.open_model(
        Path(options.checkpoint),
        load_run,
        device=options.device,
        weights=options.weights,
        dtype=options.dtype,
        allow_import=options.allow_import,
    )
    with lock_folder(Path(options.out)):
        _fill_folder(options, prompts, opened)


def _fill_folder(options: Namespace, prompts: Sequence[Prompt], opened: "OpenedModel") -> None:
    """Make the images that are missing.

    Raises:
        NonFiniteError: If some are not finite; the others are made.
    """
    from segalign.data.progress import show_progress
    from segalign.generation import generating

    folder = _open_folder(options, opened)
    jobs = generating.plan_jobs(prompts, options.seeds or range(options.num_images or 1))
    missing = folder.missing(jobs)
    num_kept = len(jobs) - len(missing)
    try:
        with show_progress("generating", len(jobs), done=num_kept) as advance:
            failed = generating.make_images(
                opened, missing, folder, batch_size=options.batch_size, advance=advance
            )
    finally:
        generating.write_overview(opened, jobs, folder)
    num_made = len(missing) - len(failed)
    print(f"made {num_made} images, kept {num_kept}; see {folder.path / 'index.html'}")
    if failed:
        raise _non_finite(failed, len(missing))


def _non_finite(failed: "Sequence[ImageJob]", num_all: int) -> NonFiniteError:
    """Name the images that are not written on stderr, and the first in the error."""
    names = [f"prompt {job.prompt.sample_id}, seed {job.seed}" for job in failed]
    for name in names:
        print(f"skipping {name}: its image is not finite", file=sys.stderr)
    return NonFiniteError(
        f"expected finite images; got NaN in {len(failed)} of {num_all}, the first of {names[0]}; "
        "they are not written. Use `--dtype float32` or `bfloat16`, which hold larger numbers than "
        "float16; if it is one of them, the weights are broken: name an earlier checkpoint."
    )


def _open_folder(options: Namespace, opened: "OpenedModel") -> "ImageFolder":
    """Set the sampler, and open the folder for what it makes."""
    from segalign.diffusion.scheduler_sampler import change_sampler, sampler_name
    from segalign.generation.image_folder import ImageFolder, ImageSettings
    from segalign.generation.own_files import clear_images

    model = opened.model
    model.sampler = change_sampler(model.sampler, options.sampler, options.steps, options.guidance)
    settings = ImageSettings(
        checkpoint=opened.digest,
        weights=opened.weights,
        sampler=sampler_name(model.sampler),
        steps=model.sampler.num_inference_steps,
        guidance=model.sampler.guidance_scale,
        dtype=opened.dtype,
    )
    path = Path(options.out)
    if options.overwrite:
        clear_images(path)
    return ImageFolder(path, settings)
