"""Which classes a config may name."""

import contextlib
from collections.abc import Iterator, Sequence

from jsonargparse import set_parsing_settings

# Packages whose classes a config may name. A config is data, and must not reach `os` or `pickle`.
ALLOWED_IMPORTS = (
    "callbacks",
    "datamodules",
    "diffusers",
    "lightning",
    "lightning_modules",
    "open_clip",
    "peft",
    "segalign",
    "torch",
    "torchmetrics",
    "transformers",
)


@contextlib.contextmanager
def permitted_classes(allow_import: Sequence[str] = ()) -> Iterator[None]:
    """Let configs name classes of the usual packages, and of more for the duration of a block.

    Args:
        allow_import: The other packages.
    """
    extra = [name for name in allow_import if name not in ALLOWED_IMPORTS]
    set_parsing_settings(
        omegaconf_absolute_to_relative_paths=True,
        import_path_denylist=["*"],
        import_path_allowlist=[*ALLOWED_IMPORTS, *extra],
    )
    try:
        yield
    finally:
        if extra:
            set_parsing_settings(import_path_denylist=extra)
