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

# Their parts that run commands, code or pickles by their purpose, which no config needs.
REFUSED_PARTS = (
    "diffusers.commands",
    "diffusers.utils.dynamic_modules_utils",
    "lightning.fabric.strategies.launchers",
    "lightning.fabric.utilities.cloud_io",
    "lightning.pytorch.strategies.launchers",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.elastic",
    "torch.distributed.launch",
    "torch.distributed.launcher",
    "torch.distributed.run",
    "torch.fx",
    "torch.hub",
    "torch.jit",
    "torch.multiprocessing",
    "torch.package",
    "torch.serialization",
    "torch.testing",
    "torch.utils.benchmark",
    "torch.utils.cpp_extension",
    "torch.utils.model_zoo",
    "transformers.cli",
    "transformers.commands",
    "transformers.dynamic_module_utils",
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
        import_path_denylist=["*", *REFUSED_PARTS],
        import_path_allowlist=[*ALLOWED_IMPORTS, *extra],
        # Where anything fits, a class would be built that no type has been checked for.
        instantiate_subclass_spec_in_any=False,
    )
    try:
        yield
    finally:
        if extra:
            set_parsing_settings(import_path_denylist=extra)
