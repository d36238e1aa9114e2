"""Readers with their safeguards taken away, in this process for good."""

import importlib
from typing import Any


def loads_any_pickle() -> None:
    """Reads ``torch.save`` files with all that they ask for."""
    import torch

    load = torch.load
    torch.load = lambda path, **settings: load(path, **{**settings, "weights_only": False})


def permits_all_classes() -> None:
    """Lets configs name classes of any package."""
    paths = importlib.import_module("lightning_modules.class_paths")
    common = importlib.import_module("jsonargparse._common")
    util = importlib.import_module("jsonargparse._util")
    paths.set_parsing_settings = lambda **_: common.set_parsing_settings(
        omegaconf_absolute_to_relative_paths=True
    )
    common.check_import_path = util.check_import_path = lambda _: None


def builds_anything() -> None:
    """Builds classes of the permitted packages where any value fits, dangerous ones too."""
    paths = importlib.import_module("lightning_modules.class_paths")
    settings = paths.set_parsing_settings

    def set_most(**given: Any) -> None:
        settings(**{**given, "instantiate_subclass_spec_in_any": True})

    paths.set_parsing_settings = set_most
    paths.REFUSED_PARTS = ()


def joins_any_name() -> None:
    """Takes the names of a checkpoint's record for files of the checkpoint unchecked."""
    run_directory = importlib.import_module("segalign.run_directory")
    run_directory.is_plain_name = lambda _: True


def reads_any_yaml() -> None:
    """Builds the Python objects that YAML files ask for."""
    import yaml

    dialect = importlib.import_module("segalign.launch.yaml_dialect")
    checks = importlib.import_module("lightning_modules.config_checks")
    dialect._SafeLoader = yaml.UnsafeLoader
    checks.yaml.safe_load = yaml.unsafe_load


def escapes_nothing() -> None:
    """Puts text into pages as it is."""
    jinja2 = importlib.import_module("jinja2")
    build = jinja2.Environment.__init__

    def unescaped(self: Any, *args: Any, **settings: Any) -> None:
        build(self, *args, **{**settings, "autoescape": False})

    jinja2.Environment.__init__ = unescaped


def sees_pipes_by_their_beginning() -> None:
    """Takes a URL for a shell command only if it is written ``pipe:`` in small letters."""
    streaming = importlib.import_module("segalign.data.streaming")

    class _Parsed:
        def __init__(self, url: str) -> None:
            self.scheme = "pipe" if url.strip().startswith("pipe:") else ""

    streaming.urlparse = _Parsed
