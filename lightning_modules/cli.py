"""The command line of training and evaluation: configs in, a run directory out."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf.errors import InterpolationKeyError
from typing_extensions import override

from lightning_modules.changed_optimizer import ChangedOptimizer
from lightning_modules.checkpoint_choice import SameCheckpoint, find_checkpoint
from lightning_modules.class_paths import permitted_classes
from lightning_modules.config_checks import check_config_files, explain_interpolation
from lightning_modules.known_noise import without_known_noise
from lightning_modules.resume_checks import (
    changes_optimizer,
    check_training,
    warn_of_other_weights,
)
from lightning_modules.short_usage_parser import LayeredConfigFile, ShortUsageParser
from lightning_modules.slurm_environment import slurm_environment
from segalign.atomic import make_directory
from segalign.errors import CancelledError, ConfigError, TerminatedError
from segalign.ranks import leaving_group
from segalign.run_directory import stored_step

_PEEKING: dict[str, Any] = {"add_help": False, "allow_abbrev": False, "exit_on_error": False}
_STAGES = ("fit", "validate", "test", "predict")


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """What every run has besides its model and data; ``main.py`` chooses it.

    Attributes:
        keyed: Callback classes whose arguments become a key of every config, such as
            ``checkpoint``, by that key; in this order they are called.
        checkpoint_io: Makes the plugin that reads and writes checkpoints.
        run_config: Makes the writer of the run's record, from the resolved config, the command
            line and the names of the config files.
        step_rng: Makes the callback that seeds training steps, from the seed.
        progress_bar: Makes the progress bar.
        image_writer: Callback class that writes predicted images, added to ``predict`` for modules
            that generate images.
        loggers: Makes the loggers, from run directory, subcommand and first optimizer step.
    """

    keyed: Mapping[str, type[Callback]]
    checkpoint_io: Callable[[], CheckpointIO]
    run_config: Callable[[dict[str, Any], list[str], list[str]], Callback]
    step_rng: Callable[[int], Callback]
    progress_bar: Callable[[], ProgressBar]
    image_writer: type[Callback]
    loggers: Callable[[Path, str, int], list[Logger]]


class SegalignCLI(LightningCLI):
    """LightningCLI with layered configs, one run directory, and no hidden sources of settings.

    Args:
        parts: What every run has besides its model and data.
        args: Command line after the program's name.
        command: The same with what the parser does not see, for the run's record.
        sources: The config files that the command line names, in their order.
    """

    def __init__(
        self,
        parts: RunParts,
        args: Sequence[str],
        *,
        command: Sequence[str],
        sources: Sequence[Path],
    ) -> None:
        self.parts = parts
        self.command = list(command)
        self.sources = sources
        self.checkpoint: Path | None = None
        self.changes_optimizer = False
        parser_mode = {"parser_mode": "omegaconf+"}
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            save_config_callback=None,
            trainer_defaults={"use_distributed_sampler": False},
            parser_kwargs={**parser_mode, **{stage: dict(parser_mode) for stage in _STAGES}},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(args),
        )

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        skipped = LightningCLI.subcommands()
        return {stage: {*skipped[stage], "weights_only"} for stage in _STAGES}

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = ShortUsageParser(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=LayeredConfigFile,
            help="Config file; give several to layer them.",
        )
        return parser

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str,
            default="runs/default",
            help="Directory of all that this run writes: config, logs, checkpoints, samples.",
        )
        parser.add_argument(
            "--vars",
            type=dict[str, Any],
            default={},
            help="Values that several settings share, used as ${vars.NAME}.",
        )
        for key, callback in self.parts.keyed.items():
            parser.add_lightning_class_args(callback, key)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        parsers = [p for p in self._subcommand_parsers.values() if isinstance(p, ShortUsageParser)]
        targets = {target for subparser in parsers for target in subparser.link_targets}
        files = [path for path in self.sources if path.is_file()]
        check_config_files(files, sorted(targets))
        for each in [parser, *parsers]:
            assert isinstance(each, ShortUsageParser)
            each.config_files = files
            each.known_keys = [a.dest for subparser in parsers for a in subparser._actions]
        try:
            self.config = parser.parse_args(args)
        except InterpolationKeyError as error:
            raise ConfigError(explain_interpolation(error)) from error

    @override
    def _parse_ckpt_path(self) -> None:
        """Do nothing: hyper-parameters stored in a checkpoint never beat the config."""

    @override
    def before_instantiate_classes(self) -> None:
        self.run_dir = Path(self._setting("run_dir"))
        make_directory(self.run_dir)
        self.checkpoint = find_checkpoint(
            self._setting("ckpt_path"),
            str(self.subcommand),
            self.run_dir,
            starts_over=self._setting("checkpoint.overwrite"),
        )
        if self.subcommand == "fit":
            changes = check_training(self._plain_config(), self.run_dir, self.checkpoint)
            self.changes_optimizer = changes_optimizer(changes)
        else:
            warn_of_other_weights(self._plain_config(), self.run_dir, self.checkpoint)

    def _setting(self, key: str) -> Any:
        return self._get(self.config, key)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        settings = self._get(self.config_init, "trainer")
        callbacks = _as_list(settings["callbacks"])
        seed = self._setting("seed_everything")
        sources = [str(path) for path in self.sources]
        callbacks += [
            self.parts.run_config(self._plain_config(), self.command, sources),
            self.parts.step_rng(int(seed)),
            SameCheckpoint(self.checkpoint),
        ]
        if settings["enable_progress_bar"] is not False and not any(
            isinstance(callback, ProgressBar) for callback in callbacks
        ):
            callbacks.append(self.parts.progress_bar())
        if self._lacks_image_writer(callbacks):
            callbacks.append(self.parts.image_writer())
        if self.changes_optimizer:
            callbacks.append(ChangedOptimizer())
        plugins = _as_list(settings["plugins"])
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(self.parts.checkpoint_io())
        own = any(isinstance(plugin, ClusterEnvironment) for plugin in plugins)
        slurm = None if own else slurm_environment()
        plugins += [] if slurm is None else [slurm]
        trainer = super().instantiate_trainer(
            callbacks=callbacks,
            plugins=plugins,
            logger=self._loggers(settings["logger"]),
            default_root_dir=str(self.run_dir),
            **kwargs,
        )
        if slurm is not None:
            # Lightning itself looks only at strategies of several processes.
            slurm.validate_settings(trainer.num_devices, trainer.num_nodes)
        return trainer

    def _lacks_image_writer(self, callbacks: Sequence[Callback]) -> bool:
        is_written = any(isinstance(callback, self.parts.image_writer) for callback in callbacks)
        return self.subcommand == "predict" and hasattr(self.model, "generate") and not is_written

    def _loggers(self, configured: Any) -> list[Logger] | bool:
        """Add our loggers to the configured ones, but for kinds that are configured already."""
        if configured is False:
            return False
        theirs = [] if configured in (None, True) else _as_list(configured)
        step = 0 if self.checkpoint is None else stored_step(self.checkpoint)
        ours = self.parts.loggers(self.run_dir, str(self.subcommand), step)
        kinds = (TensorBoardLogger, CSVLogger)
        taken = {kind for kind in kinds for logger in theirs if isinstance(logger, kind)}
        return theirs + [logger for logger in ours if not isinstance(logger, tuple(taken))]

    def _plain_config(self) -> dict[str, Any]:
        parser = self._parser(self.subcommand)
        text = parser.dump(self.config[self.subcommand], format="yaml", skip_unset=False)
        return dict(yaml.safe_load(text))

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        settings = {**super()._prepare_subcommand_kwargs(subcommand), "ckpt_path": self.checkpoint}
        if subcommand == "predict" and settings.get("return_predictions") is None:
            settings["return_predictions"] = False
        return settings


def run(argv: Sequence[str], parts: RunParts) -> SegalignCLI:
    """Run a subcommand.

    Args:
        argv: Arguments after the program's name. ``--allow_import PACKAGE`` (repeatable) lets
            configs name classes of one more package; it works on the command line only, so that a
            config cannot permit itself anything. ``--strict`` stands for ``--data.strict true``.
        parts: See ``RunParts``.

    Raises:
        TerminatedError: If SIGTERM has ended it, for which Lightning alone would return 0.
        CancelledError: If Ctrl-C has ended it.
    """
    known, rest = _peek(argv)
    with permitted_classes(known.allow_import), without_known_noise():
        sources = [Path(source) for source in known.config]
        try:
            with leaving_group():
                return SegalignCLI(parts, rest, command=argv, sources=sources)
        except SIGTERMException as error:
            raise TerminatedError(
                "ended by SIGTERM; what was trained since the last checkpoint is lost; go on with "
                "`--ckpt_path auto`, or set `preemption.signal: TERM` to save first"
            ) from error
        except SystemExit as error:
            # What Lightning makes of Ctrl-C.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise CancelledError(
                    "ended by Ctrl-C; what was trained since the last checkpoint is lost; go on "
                    "with `--ckpt_path auto`"
                ) from error
            raise


def _peek(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Take our own words out of a command line, and see which config files it names."""
    words = argparse.ArgumentParser(**_PEEKING)
    words.add_argument("--allow_import", action="append", default=[])
    words.add_argument("--strict", action="store_true")
    own, rest = words.parse_known_args(argv)
    rest += ["--data.strict=true"] if own.strict else []
    configs = argparse.ArgumentParser(**_PEEKING)
    configs.add_argument("--config", "-c", action="append", default=[])
    return configs.parse_known_args(rest, own)[0], rest


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
