"""What Lightning prints that its users can do nothing about."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

# Lightning 2.6 itself calls what jsonargparse 5 and newer PyTorch will drop; both are bounded in
# pyproject.toml, so its users need not read about it.
_KNOWN_WARNINGS = (
    r"(?s).*JSONARGPARSE_DEPRECATION_WARNINGS",
    r"(?s).*instantiate_classes",
    r"(?s).*add_instantiator",
    r"(?s).*skip_none",
    r".*isinstance\(treespec, LeafSpec\)",
)
# Frozen parts evaluate on purpose; the summary counts parameters, whatever the precision.
# Where SLURM's client is installed, not every run is a job.
_KNOWN_PARTS = (
    r".*`srun` command is available on your system but is not used",
    r"Found \d+ module\(s\) in eval mode",
    r"Precision .* is not supported by the model summary",
)


@contextlib.contextmanager
def without_known_noise() -> Iterator[None]:
    """Keep Lightning from warning of its own dependencies and from advertising other packages."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")

    def is_no_tip(record: logging.LogRecord) -> bool:
        return "Tip: For seamless cloud" not in record.getMessage()

    logger.addFilter(is_no_tip)
    try:
        with warnings.catch_warnings():
            for message in (*_KNOWN_WARNINGS, *_KNOWN_PARTS):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logger.removeFilter(is_no_tip)
